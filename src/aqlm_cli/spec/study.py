"""A study: many runs of one model on one calibration set, evaluated alike.

    model: smollm2-135m
    calibrate: {data: "builtin:80"}
    eval_ppl: {data: [builtin]}
    cells:
      - {method: rtn, scheme: int3g64}
      - {scheme: 3x8g8, name: additive}
      - {target_size: 60MB, quantize: {fit: {epochs: 0}}}

Everything but `cells` is a run file that all of them share. A cell has flags of `quantize`, or parts of a run file, or
both; `name` is that of its run directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ConfigError, UsageError
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.flags import MODEL, QUANTIZE, as_settings
from aqlm_cli.spec.run_file import check_keys, config_of, merge, read_mapping

FLAGS = {"bits", *QUANTIZE} - set(MODEL) - {"data", "sequences", "sequence_length", "bos"}
"""Flags of `quantize` that a cell may have."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """The cells of a file, in order; their names differ."""

    name: str
    cells: tuple[Cell, ...]


def load_study(path: Path) -> Study:
    """Read a study; ConfigError for a cell that is no run, or that has the name of another."""
    shared = read_mapping(path)
    stored = shared.pop("cells", None)
    if not isinstance(stored, list) or not stored:
        raise ConfigError(f"{path} has no cells; list them, such as `cells: [{{scheme: 2x8g8}}, {{scheme: 3x8g8}}]`")
    check_keys(shared, path)
    cells = tuple(_cell(path, number, shared, one) for number, one in enumerate(stored, 1))
    names = [cell.name for cell in cells]
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise ConfigError(f"{path}: two cells are called {twice}; give one of them another `name`")
    return Study(path.stem, cells)


def _cell(path: Path, number: int, shared: dict[str, Any], stored: Any) -> Cell:
    origin = f"{path}, cell {number}"
    if not isinstance(stored, dict):
        raise ConfigError(f"{origin} must hold keys and values, such as `{{scheme: 2x8g8}}`")
    flags = {key: value for key, value in stored.items() if key in FLAGS}
    rest = {key: value for key, value in stored.items() if key not in FLAGS and key != "name"}
    check_keys(rest, origin)
    for key, value in flags.items():
        _refuse_type(key, value, origin)
    try:
        own = merge(rest, as_settings(flags, QUANTIZE))
    except UsageError as error:
        raise ConfigError(f"{origin}: {error}") from error
    config = config_of({str(path): shared, origin: own})
    name = stored.get("name", _name_of(config))
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("comparison."):
        way_out = "use letters, digits and -._+, and another beginning than `comparison.`"
        raise ConfigError(f"{origin}: {name!r} is no name for a directory; {way_out}")
    return Cell(name, config)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bits": (_is_number, "a number"),
    "layer": (_are_texts, "a list of texts such as ['.*down_proj=3x8g8']"),
    **dict.fromkeys(("among", "target"), (_is_text, "a text, as on the command line")),
}
"""Flags that `as_settings` reads itself, their types, and the words for them; settings check all others."""


def _refuse_type(key: str, value: Any, origin: str) -> None:
    """ConfigError for a flag of another type than on the command line."""
    right, words = TYPES.get(key, (None, ""))
    if right is not None and not right(value):
        raise ConfigError(f"{origin}: {key} must be {words}, found {value!r}")


def _name_of(config: RunConfig) -> str:
    """`rtn-int3g64`, or `aqlm-60MB` for a target."""
    section = config.quantize
    what = section.scheme if section.target.question is None else str(section.target)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{section.method}-{what}").strip("-")
