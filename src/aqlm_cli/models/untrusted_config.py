"""What a stranger's config.json may ask for at most: in a few bytes it can name a billion layers, or code to fetch."""

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
"""Parameters that a network may have for each tensor in its files: experts may be one there, and three each here."""

NUMBERS_PER_BYTE = 64
"""Numbers that a network may have for each byte of its files, which are coded at an eighth of a bit then."""


@contextmanager
def at_most(parameters: int, name: str) -> Iterator[None]:
    """ModelError once a network under construction has more: in a few bytes a file can ask for a billion layers."""
    seen = 0

    def count(module: nn.Module, own_name: str, parameter: nn.Parameter | None) -> None:
        nonlocal seen
        seen += 1
        if seen > parameters:
            raise ModelError(f"{name}: its settings ask for more than {parameters} tensors, which it does not hold")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def refuse_untrusted(source: ModelSource) -> None:
    """ModelError for what must not reach transformers: counts that it would loop over, and code that it would fetch."""
    for path, value in _leaves(model_config(source)):
        said = f"{shortened(path)} {shortened(str(value))}"
        counts = re.search(r"(^|\.)(num_|n_(layer|head|expert))[^.]*$|layers?$", path)
        if counts and isinstance(value, int) and abs(value) > MOST_PARTS:
            raise ModelError(f"{source.name} asks in its config.json for {said}, more than any model has")
        if "_implementation" in path and "/" in str(value):
            raise ModelError(f"{source.name} asks in its config.json for {said}, code from the hub; remove that line")


def _leaves(settings: Any) -> Iterator[tuple[str, Any]]:
    """Whatever is neither object nor list in a JSON value, with the keys that lead there: "text_config.dtype"."""
    waiting = [("", settings)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value]
        else:
            yield path, value
