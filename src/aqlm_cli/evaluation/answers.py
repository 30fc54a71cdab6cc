"""Outcomes of a model on questions, and their means beside another model's on the same questions.

The mean over n questions has the standard error of independent draws, sqrt(sum (x - mean)^2 / (n (n - 1))): for
accuracies p, of outcomes 0 and 1, that is the binomial sqrt(p (1 - p) / (n - 1)). The difference of two models is the
mean of the differences on each question, and its error the same formula for these: a question that both answer alike
adds nothing to it, as in McNemar's test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

Outcomes: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]
"""Outcomes of the questions by task and metric; of an accuracy 1 where the answer is right, else 0."""

ALL = "all"
"""Name of all tasks together, each question counted once."""


@dataclass(frozen=True)
class Answers:
    """Outcomes of a model, and what was read for them.

    `digest` is that of the questions. `sequences` were read, in which `tokens` were scored; `cut` of them were too
    long and lost their beginning. `likelihoods`: of each question the log-likelihood of each choice, in nats.
    """

    outcomes: Outcomes
    digest: str
    sequences: int
    tokens: int
    cut: int
    likelihoods: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Mean:
    """A mean over questions with its standard error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class TaskScore:
    """Mean of a metric over the questions of a task; `difference` is the model's less the base model's, paired by
    question."""

    task: str
    metric: str
    questions: int
    mean: float
    stderr: float
    base_model: Mean | None
    difference: Mean | None


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least two values."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return Mean(float(numbers.mean()), float(numbers.std() / len(numbers) ** 0.5))


def scores_of(own: Outcomes, base: Outcomes | None) -> tuple[TaskScore, ...]:
    """The score of every task and metric; last those of all tasks together, where there are several."""
    return tuple(
        _score(task, metric, values, None if base is None else others)
        for (task, metric, values), (_, _, others) in zip(_rows(own), _rows(base or own), strict=True)
    )


def _rows(outcomes: Outcomes) -> Iterator[tuple[str, str, Sequence[float]]]:
    for task, metrics in outcomes.items():
        for metric, values in metrics.items():
            yield task, metric, values
    if len(outcomes) > 1:
        first, *others = outcomes.values()
        for metric in first:
            if all(metric in metrics for metrics in others):
                yield ALL, metric, [value for metrics in outcomes.values() for value in metrics[metric]]


def _score(task: str, metric: str, values: Sequence[float], base: Sequence[float] | None) -> TaskScore:
    mean = mean_of(values)
    return TaskScore(
        task=task,
        metric=metric,
        questions=len(values),
        mean=mean.mean,
        stderr=mean.stderr,
        base_model=None if base is None else mean_of(base),
        difference=None if base is None else mean_of([a - b for a, b in zip(values, base, strict=True)]),
    )
