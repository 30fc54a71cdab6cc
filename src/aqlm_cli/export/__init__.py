"""A quantized model in, files that others load out: one file a format.

    export(base, {"model.layers.0.mlp.up_proj": matrix}, {}, Path("packed"), EXPORTERS["dense"])

A new format is one file with an Exporter, one row in EXPORTERS, and its name in `spec.config.PackFormat`.
"""

from __future__ import annotations

from collections.abc import Mapping

from aqlm_cli.export.dense import DenseExporter
from aqlm_cli.export.directory import Export, export, plan_export
from aqlm_cli.export.exporter import Exporter
from aqlm_cli.export.layout import Layout
from aqlm_cli.export.model import ExportedLayer, QuantizedModel, read_model
from aqlm_cli.export.model_card import ExportFacts, Origin
from aqlm_cli.export.native import NativeExporter
from aqlm_cli.export.transformers import TransformersExporter
from aqlm_cli.spec.plan import Plan

__all__ = [
    "EXPORTERS",
    "Export",
    "ExportFacts",
    "ExportedLayer",
    "Exporter",
    "Layout",
    "Origin",
    "QuantizedModel",
    "export",
    "exporter_for",
    "plan_export",
    "read_model",
]

EXPORTERS: Mapping[str, Exporter] = {
    exporter.name: exporter for exporter in (TransformersExporter(), NativeExporter(), DenseExporter())
}
"""Exporters by name of the format; `pack.format` of a run file takes these names."""


def exporter_for(format: str, plan: Plan) -> Exporter:
    """The exporter of a format; for `auto` the first of the table that keeps every matrix at the bits of its scheme."""
    if format != "auto":
        return EXPORTERS[format]
    return next(exporter for exporter in EXPORTERS.values() if exporter.holds(plan))
