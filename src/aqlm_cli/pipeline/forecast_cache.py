"""The forecast that a run keeps, so that a resumed run is compared with the forecast from before the interruption.

`reports/forecast.json` is a cache: absent, of another version or of other settings, it is made again without a word;
damaged, it is made again with a warning. No result depends on what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from aqlm_cli.events import Emit, Warned
from aqlm_cli.formatting import plain
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.cost import Cost

FORECAST = "forecast.json"

VERSION = 1


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int
    settings: dict[str, Any]
    costs: dict[str, Cost]


def keep_costs(run: RunDirectory, config: RunConfig, costs: Mapping[str, Cost]) -> None:
    """Keep what the stages are expected to take under these settings, by the name of each."""
    run.write_report(FORECAST, {"version": VERSION, "settings": plain(config.model_dump()), "costs": plain(costs)})


def kept_costs(run_directory: Path, config: RunConfig, emit: Emit) -> Mapping[str, Cost] | None:
    """The costs that were kept under the same settings, or None where they have to be made again."""
    path = RunDirectory(run_directory, config).reports / FORECAST
    if not path.exists():
        return None
    try:
        text = path.read_bytes()
        content = json.loads(text)
        if isinstance(content, dict) and content.get("version") != VERSION:
            return None
        kept = _Kept.model_validate_json(text)
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        emit(Warned(f"{path} cannot be read ({reason}); the forecast is made again"))
        return None
    return kept.costs if kept.settings == plain(config.model_dump()) else None
