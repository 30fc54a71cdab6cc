"""What all tests share: a home of their own, and a disk that can be made to fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of models and digests start empty, and the user's own stay untouched."""
    directory = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(directory))
    return directory


@pytest.fixture
def fail_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`fail_disk(code, successes)`: after so many writes every further one fails with this errno.

    It is the sync that fails, which is where a full disk may first speak up: all bytes seem to be written by then.
    """

    def fail(code: int, successes: int) -> None:
        sync, calls = os.fsync, []

        def broken(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > successes:
                raise OSError(code, os.strerror(code))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", broken)

    return fail
