"""Evaluation: a model goes in, numbers with their error come out.

An evaluation knows nothing of run directories. Where a result is kept, and under which name, is decided by the caller:
`files` says what there is to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

from aqlm_cli.errors import UsageError
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.events import Emit
from aqlm_cli.records import Record

Settings = TypeVar("Settings", contravariant=True)

Remember: TypeAlias = Callable[[Mapping[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]
"""All that figures depend on, and a function that computes them -> the figures, which may have been kept: JSON."""


def compute_again(facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The Remember that keeps nothing."""
    return compute()


def needed(base: EvaluatedModel | None, model: EvaluatedModel) -> EvaluatedModel:
    """The base model. Raises UsageError where there is none."""
    if base is None:
        raise UsageError(f"{model.name} has no base model to compare with; give a run directory")
    return base


class Evaluation(Protocol[Settings]):
    @property
    def beside_base(self) -> bool:
        """True where figures of the base model stand beside the model's; otherwise it is not looked for."""
        ...

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: Settings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> Record:
        """Measure `model`, and beside it the `base` model that it was made from; None: the model alone.

        Figures of the base model, which are the same for all that is made from it, may come from `remember`.
        """
        ...

    def files(self, report: Any) -> Mapping[str, Mapping[str, Any] | bytes]:
        """Content of the files worth keeping, by name: JSON, or a picture."""
        ...
