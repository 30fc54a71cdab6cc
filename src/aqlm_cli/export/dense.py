"""An ordinary 16-bit checkpoint: every matrix, of whatever kind, as the weight that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.export.layout import Layout, named_as_stored, plan_slots
from aqlm_cli.export.model import QuantizedModel
from aqlm_cli.export.model_card import DENSE_LOADING, CardFacts, model_card
from aqlm_cli.export.tensors import entries
from aqlm_cli.export.transformers import base_config, refuse_disagreement, refuse_unloadable
from aqlm_cli.export.writer import Entry
from aqlm_cli.models import ModelSource, Network
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.plan import Plan
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import Matrix


class DenseExporter:
    name = "dense"

    def holds(self, plan: Plan) -> bool:
        return False

    def layouts(
        self,
        network: Network,
        stored: Mapping[str, TensorLayout],
        schemes: Mapping[str, Scheme | None],
        changed: Collection[str],
    ) -> Layout:
        layout = Layout(named_as_stored(plan_slots(network, stored, schemes, changed), stored), quantization=None)
        refuse_unloadable(network, layout, (), self.name)
        return layout

    def tensors(self, model: QuantizedModel, layout: Layout) -> dict[str, Entry]:
        return entries(model, layout, _tensor)

    def config(self, model: QuantizedModel, layout: Layout) -> dict[str, Any]:
        return base_config(model)

    def card(self, facts: CardFacts, layout: Layout) -> str:
        return model_card(facts, DENSE_LOADING)

    def verify(self, base: ModelSource, layout: Layout, directory: Path) -> None:
        refuse_disagreement(base, layout, directory, self.name)


def _tensor(matrix: Matrix, last: str, dtype: torch.dtype) -> Tensor:
    assert last == "weight"
    return matrix.dequantize(dtype)
