"""Nothing asks which kind of matrix or which method it has before it: it asks the matrix, the layer or the scheme.

The exceptions are the files of the additive kind itself. Each must hold a branch that is found here, so that the list
does not outlive its reasons, and a scan that finds nothing cannot pass.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("src", "kernels") for path in (ROOT / folder).rglob("*.py"))

ALLOWED = {
    "kernels/aqlm_kernels/cpu/rows.py": "compiled rows, one class for each kind that has them",
    "kernels/aqlm_kernels/cpu/stacks.py": "compiled matmuls of the decoder, one for each kind that has them",
    "src/aqlm_cli/evaluation/candidates.py": "layers whose compiled products `bench` times alone",
    "src/aqlm_cli/evaluation/matmul.py": "the shape of such a product, for each kind that has one",
    "src/aqlm_cli/models/decoding.py": "backends, among which only additive layers choose",
    "kernels/aqlm_kernels/linear.py": "coded_layers: the layers that the compiled products are for",
    "kernels/aqlm_kernels/patch_transformers.py": "layers of the inference package aqlm, by the name of their module",
    "src/aqlm_cli/export/transformers.py": "the exporter of the format that holds codes",
    "src/aqlm_cli/models/quantization.py": "the name of that format in config.json",
}
"""Files that may, and what for."""

NAMES = {"aqlm", "additive"}
"""The method and the kind."""


def branches(source: str) -> Iterator[int]:
    """Lines of the tests for an additive type, and of the comparisons with the name of the method or kind."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            tested = node.args[1:]
        elif isinstance(node, ast.Compare):
            tested = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            tested = [node.pattern]
        else:
            continue
        if any(_is_additive(part) for one in tested for part in ast.walk(one)):
            yield tested[0].lineno


def _is_additive(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value in NAMES
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.startswith("Additive")


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(matrix, AdditiveMatrix)",
        "isinstance(layer, (nn.Linear, aqlm_kernels.AdditiveLinear))",
        "issubclass(kind, AdditiveScheme)",
        "type(scheme) is AdditiveScheme",
        "method == 'aqlm'",
        "'additive' != kind",
        "config.quantize.method in ('aqlm', 'rtn')",
        "match matrix:\n    case AdditiveMatrix(): pass",
        "match method:\n    case 'aqlm': pass",
    ],
)
def test_a_branch_is_seen(line: str) -> None:
    assert list(branches(line)), line


@pytest.mark.parametrize(
    "line",
    ["AdditiveMatrix(codes, codebooks, scales)", "isinstance(layer, QuantizedLayer)", "METHODS = {'aqlm': quantize}"],
)
def test_what_is_no_branch_is_not(line: str) -> None:
    assert not list(branches(line)), line


def test_no_branch_on_an_additive_type_or_name() -> None:
    assert len(SOURCES) > 150
    found = {str(path.relative_to(ROOT)): list(branches(path.read_text())) for path in SOURCES}
    lines = {path: numbers for path, numbers in found.items() if numbers}
    others = [f"{path}:{number}" for path, numbers in lines.items() if path not in ALLOWED for number in numbers]
    assert not others, f"ask the matrix, the layer or the scheme instead: {', '.join(others)}"
    assert lines.keys() == ALLOWED.keys(), "a file of ALLOWED has no such branch any more"
