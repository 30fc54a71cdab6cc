from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aqlm_cli.runs import digests
from aqlm_cli.runs.digests import cached_digest


def test_a_file_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    digest = cached_digest(path, tmp_path / "cache")
    monkeypatch.setattr(digests, "digest_file", lambda path: "read again")
    assert cached_digest(path, tmp_path / "cache") == digest
    path.write_bytes(b"abcd")
    assert cached_digest(path, tmp_path / "cache") == "read again"


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[]", "{}{}", '{"a": [1, 2, "x"]} tail'])
def test_a_damaged_memory_of_digests_is_written_again(content: str, tmp_path: Path) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"abc")
    cache.mkdir()
    (cache / "digests.json").write_text(content)
    assert cached_digest(path, cache) == hashlib.sha256(b"abc").hexdigest()
    assert [entry[2] for entry in json.loads((cache / "digests.json").read_text()).values()] == [
        hashlib.sha256(b"abc").hexdigest()
    ]
    assert [found.name for found in cache.iterdir()] == ["digests.json"]


def test_commands_that_remember_digests_at_once_leave_a_whole_memory(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for number in range(40):
        (tmp_path / f"file-{number}").write_bytes(bytes([number]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: cached_digest(tmp_path / f"file-{number}", cache), range(40)))
    assert found == [hashlib.sha256(bytes([number]) * 1000).hexdigest() for number in range(40)]
    kept = json.loads((cache / "digests.json").read_text())
    assert {entry[2] for entry in kept.values()} <= {*found} and kept


def test_only_the_latest_digests_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "REMEMBERED", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        cached_digest(tmp_path / name, tmp_path / "cache")
    kept = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert [Path(path).name for path in kept] == ["b", "c"]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    (tmp_path / "weights").write_bytes(b"abc")
    assert len(cached_digest(tmp_path / "weights", tmp_path / "cache")) == 64
