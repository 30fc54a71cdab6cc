"""Limits for an untrusted config.json: in a few bytes it can ask for a billion layers, or for code to download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.source import ModelSource, model_config

MOST_PARTS = 100_000
"""Layers, heads, experts or labels that a config.json may ask for: a hundred times as many as any does."""

PARAMETERS_PER_TENSOR = 300
"""Parameters that a network may have per tensor in its files: fused experts are one there, and three each here."""

NUMBERS_PER_BYTE = 64
"""Weights that a network may have per byte of its files: an eighth of a bit per weight."""


@contextmanager
def at_most(parameters: int, name: str) -> Iterator[None]:
    """Raise ModelError once a network under construction has more parameters."""
    seen = 0

    def count(module: nn.Module, own_name: str, parameter: nn.Parameter | None) -> None:
        nonlocal seen
        seen += 1
        if seen > parameters:
            raise ModelError(f"{name}: its settings ask for more than {parameters} tensors, more than it holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def refuse_untrusted(source: ModelSource) -> None:
    """Raise ModelError for settings that must not reach transformers: huge loop counts, and code from the hub."""
    for path, value in _leaves(model_config(source)):
        setting = f"{shortened(path)} {shortened(str(value))}"
        counts = re.search(r"(^|\.)(num_|n_(layer|head|expert))[^.]*$|layers?$", path)
        if counts and isinstance(value, int) and abs(value) > MOST_PARTS:
            raise ModelError(f"{source.name} asks in its config.json for {setting}, more than any model has")
        if "_implementation" in path and "/" in str(value):
            raise ModelError(f"{source.name} asks in its config.json for {setting}, code from the hub; remove it")


def _leaves(settings: Any) -> Iterator[tuple[str, Any]]:
    """Scalars in a JSON value, each with its path of keys: "text_config.dtype"."""
    waiting = [("", settings)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value]
        else:
            yield path, value
