"""Accuracy of a model on questions, beside its base model's on the same questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.arguments import check_fields
from aqlm_cli.errors import UsageError
from aqlm_cli.evaluation.answers import Answers, Outcomes, TaskScore, scores_of
from aqlm_cli.evaluation.choices import LocalTask
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.harness import HarnessTask
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.passport import PACKAGES, Passport, tokenizer_digest, versions_of
from aqlm_cli.evaluation.perplexity import DTYPES
from aqlm_cli.events import Emit
from aqlm_cli.formatting import file_word, text_name
from aqlm_cli.records import Record


class Task(Protocol):
    """Questions, and a way to ask them."""

    @property
    def protocol(self) -> str:
        """The name of the way in a passport."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that outcomes depend on, beside those of every passport."""
        ...

    def answers(self, model: EvaluatedModel, tokenizer: Any, dtype: str, emit: Emit) -> Answers:
        """The answers of a model, whose network computes in this type."""
        ...


@dataclass(frozen=True)
class TasksSettings:
    """`task` is a file of JSON lines (data/questions.py), or a task of lm-evaluation-harness: its name, or a YAML file.

    `questions`: only the first so many of each task; None: all. Weights and matmuls are in `dtype`, the log-softmax
    in float32.
    """

    task: str
    questions: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.questions is not None and self.questions < 2:
            raise UsageError(f"{self.questions} questions give no standard error; ask at least 2, or all")
        if self.dtype not in DTYPES:
            raise UsageError(f"there is no type {self.dtype!r} to compute in; choose {', '.join(DTYPES)}")


def open_task(settings: TasksSettings) -> Task:
    """The task that the settings name.

    Raises DataError for a file with a line that is no question, and UsageError for the name of a task where
    lm-evaluation-harness is not installed.
    """
    if os.path.isfile(settings.task) and Path(settings.task).suffix not in (".yaml", ".yml"):
        return LocalTask(settings.task, settings.questions)
    return HarnessTask(settings.task, settings.questions)


@dataclass(frozen=True)
class TasksReport(Record):
    """Scores of `model` on `task`, beside the base model's where there is one.

    `first`: so many questions of each task were asked, None: all. `cut`: sequences that were too long and lost their
    beginning. `outcomes` has those of every question, by task and metric; `likelihoods` the log-likelihoods of its
    choices, in nats, where the questions are those of a file.
    """

    model: str
    task: str
    first: int | None
    dtype: str
    cut: int
    scores: tuple[TaskScore, ...]
    passport: Passport
    outcomes: Outcomes = field(repr=False)
    base_outcomes: Outcomes | None = field(repr=False)
    likelihoods: tuple[tuple[float, ...], ...] = field(repr=False)
    version: int = 1

    def table(self) -> Group:
        columns = ["task", "metric", "questions", "score"]
        paired = self.base_outcomes is not None
        table = Table(*columns, *(["base", "difference"] * paired), title=Text(f"{self.model}: {text_name(self.task)}"))
        table.title_justify = "left"
        for score in self.scores:
            means = [score, score.base_model] if paired else [score]
            cells = [f"{one.mean:.4f} ± {one.stderr:.4f}" for one in means if one is not None]
            if score.difference is not None:
                cells.append(f"{score.difference.mean:+.4f} ± {score.difference.stderr:.4f}")
            table.add_row(Text(score.task), Text(score.metric), str(score.questions), *cells)
        cut = f"; {self.cut} cut from the left" if self.cut else ""
        return Group(table, Text(f"{self.dtype}; {self.passport.sequences} sequences{cut}"))


class TasksEvaluation:
    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: TasksSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> TasksReport:
        task, tokenizer = open_task(settings), model.tokenizer()
        answers = task.answers(model, tokenizer, settings.dtype, emit)
        passport = Passport(
            protocol=task.protocol,
            text=answers.digest,
            tokenizer=tokenizer_digest(tokenizer),
            model=model.identity,
            sequences=answers.sequences,
            scored=answers.tokens,
            dtype=settings.dtype,
            versions=versions_of(*PACKAGES, *task.packages),
        )

        def compute() -> dict[str, Any]:
            return {"outcomes": task.answers(base, tokenizer, settings.dtype, emit).outcomes} if base else {}

        outcomes: Outcomes | None = None
        if base is not None:
            facts = {"task": text_name(settings.task), "column": list(passport.column), "model": base.identity}
            outcomes = remember(facts, compute)["outcomes"]
        return TasksReport(
            model=model.name,
            task=settings.task,
            first=settings.questions,
            dtype=settings.dtype,
            cut=answers.cut,
            scores=scores_of(answers.outcomes, outcomes),
            passport=passport,
            outcomes=answers.outcomes,
            base_outcomes=outcomes,
            likelihoods=answers.likelihoods,
        )

    def files(self, report: TasksReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """eval-tasks-arc_easy.json, with -first100 where only so many questions were asked; of a path only its name."""
        name = file_word(text_name(report.task))
        return {f"eval-tasks-{name}{f'-first{report.first}' if report.first else ''}.json": report.as_json()}
