"""Exporter: one format of files. This protocol is all that the rest of the program knows of a format.

An exporter is asked in this order: `layouts` plans every tensor from names and shapes alone, `tensors` says how to get
each of them, `config` and `card` give the text beside them, and `verify` loads what was written. An exporter holds no
state; `export/directory.py` does the writing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from aqlm_cli.export.layout import Layout
from aqlm_cli.export.model import QuantizedModel
from aqlm_cli.export.model_card import CardFacts
from aqlm_cli.export.writer import Entry
from aqlm_cli.models import ModelSource, Network
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.plan import Plan
from aqlm_cli.spec.schemes import Scheme


class Exporter(Protocol):
    @property
    def name(self) -> str:
        """Key of the format in EXPORTERS and in the run file."""
        ...

    def holds(self, plan: Plan) -> bool:
        """True where the files keep every matrix at the bits of its scheme."""
        ...

    def layouts(
        self,
        network: Network,
        stored: Mapping[str, TensorLayout],
        schemes: Mapping[str, Scheme | None],
        changed: Collection[str],
    ) -> Layout:
        """Plan name, type and shape of every tensor, before any exists.

        `network` has no values, and `stored` are the tensors in the files of the base model. `schemes` holds the
        quantized layers by path (None: a matrix that has no scheme), `changed` the names of the other parameters that
        differ from the base model. Raises PlanError where the format cannot hold the model, or a loader would fail.
        """
        ...

    def tensors(self, model: QuantizedModel, layout: Layout) -> dict[str, Entry]:
        """Every tensor of the layout by name, read only when its turn to be written comes."""
        ...

    def config(self, model: QuantizedModel, layout: Layout) -> dict[str, Any]:
        """Content of config.json."""
        ...

    def card(self, facts: CardFacts, layout: Layout) -> str:
        """Content of README.md."""
        ...

    def verify(self, base: ModelSource, layout: Layout, directory: Path) -> None:
        """Load the written directory as its readers do; ArtifactError where they fail or compute something else."""
        ...
