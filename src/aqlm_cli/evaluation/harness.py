"""Tasks of lm-evaluation-harness, run by that package on a network of ours.

lm_eval is optional and imported where it is used: it takes ten seconds. The harness tokenizes and computes the metrics;
here its requests are counted on their way to the network, and the outcomes of single questions taken from its samples.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from aqlm_cli.data.sources import reading_hub
from aqlm_cli.errors import FOREIGN_ERRORS, DataError, ModelError, UsageError
from aqlm_cli.evaluation.answers import Answers
from aqlm_cli.evaluation.choices import NOT_FINITE, context_length
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.perplexity import DTYPES
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.models.loading import first_line

PACKAGE = "lm-eval"
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""Methods by which the harness asks a network."""


class HarnessTask:
    """A task of lm-evaluation-harness, a group or a tag of them, by its name or as a YAML file; `first`: only so many
    questions of each task."""

    packages = (PACKAGE,)

    def __init__(self, name: str, first: int | None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                f"{name} is no file of questions; if it is a task of lm-evaluation-harness, install that: "
                f'pip install "aqlm-cli[eval]"'
            )
        self._name, self._first = name, first

    @property
    def protocol(self) -> str:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"

    def answers(self, model: EvaluatedModel, tokenizer: Any, dtype: str, emit: Emit) -> Answers:
        """The answers of a model. Raises UsageError for an unknown name, DataError for data that cannot be read."""
        with _quiet():
            if "_loaded" not in vars(self):
                emit(Noted(f"looking for {self._name} among the tasks of {self.protocol}"))
            manager, tasks = self._loaded
            network: Any = model.network(DTYPES[dtype])
            counted = _Counted(network, tokenizer, torch.promote_types(DTYPES[dtype], torch.float32), model, emit)
            results = self._evaluated(counted, manager, tasks)
        if counted.cut:
            told = (
                f"{counted.cut} of {counted.sequences} sequences are longer than the {context_length(network)} tokens"
            )
            emit(Noted(f"{told} that {model.name} reads; their beginning is left out"))
        outcomes = {task: _outcomes(task, results, emit) for task in results["samples"]}
        outcomes = {task: metrics for task, metrics in outcomes.items() if metrics}
        if not outcomes:
            raise DataError(
                f"{self._name} has no metric that is a mean over two questions or more; choose another task"
            )
        return Answers(outcomes, _digest(results["samples"]), counted.sequences, counted.tokens, counted.cut)

    @cached_property
    def _loaded(self) -> tuple[Any, list[Any]]:
        """The harness's index, and the tasks themselves, whose data is read."""
        from lm_eval.tasks import TaskManager

        # The index of all tasks takes a minute; a file needs none.
        manager = TaskManager(include_defaults=not Path(self._name).is_file())
        if self._name not in manager.task_index and not Path(self._name).is_file():
            raise UsageError(f"{self._name} is neither a file nor a task of {self.protocol}; see `lm-eval ls tasks`")
        with reading_hub(self._name):
            try:
                return manager, list(manager.load([self._name])["tasks"].values())
            except (*FOREIGN_ERRORS, ImportError) as error:
                raise DataError(f"{self.protocol} cannot load {self._name}: {first_line(error)}") from error

    def _evaluated(self, counted: _Counted, manager: Any, tasks: list[Any]) -> Mapping[str, Any]:
        import lm_eval

        try:
            results: Mapping[str, Any] = lm_eval.simple_evaluate(
                model=counted.harness_model,
                tasks=tasks,
                task_manager=manager,
                limit=self._first,
                bootstrap_iters=0,  # standard errors of means need none, and others are not reported
            )
        except (*FOREIGN_ERRORS, ImportError) as error:
            raise DataError(f"{self.protocol} cannot ask {self._name}: {first_line(error)}") from error
        return results


class _Counted:
    """The harness's model around a network, which counts what is read and tells of progress."""

    def __init__(self, network: Any, tokenizer: Any, softmax: torch.dtype, model: EvaluatedModel, emit: Emit) -> None:
        from lm_eval.models.huggingface import HFLM

        self.sequences = self.tokens = self.cut = 0
        self._name, self._stage, self._emit, self._done = model.name, f"tasks {model.short_name}", emit, 0
        lm = HFLM(
            pretrained=network,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
            backend="causal",
            batch_size=1,
            max_length=context_length(network),
            softmax_dtype=softmax,
        )
        self.harness_model: Any = lm
        lm.set_cache_hook(self)
        lm._loglikelihood_tokens = partial(self._count, lm._loglikelihood_tokens)
        for name in REQUESTS:
            setattr(lm, name, partial(self._ask, getattr(lm, name)))

    def add_partial(self, *_: object) -> None:
        """Tell of one answer; the harness calls this method of its cache after each."""
        self._done += 1
        self._emit(Advanced(self._stage, self._done))

    def _ask(self, method: Callable[..., Any], requests: Sequence[Any]) -> Any:
        self._done = 0
        self.sequences += len(requests)
        self._emit(StageStarted(self._stage, len(requests), "request"))
        return method(requests, disable_tqdm=True)

    def _count(
        self, method: Callable[..., Any], requests: Sequence[Any], disable_tqdm: bool = True, **options: Any
    ) -> Any:
        for _, context, continuation in requests:
            self.tokens += len(continuation)
            self.cut += len(context) + len(continuation) > self.harness_model.max_length + 1
        answers = method(requests, disable_tqdm=True, **options)
        if not all(math.isfinite(likelihood) for likelihood, _ in answers):
            raise ModelError(f"{self._name}: a log-likelihood is not finite; {NOT_FINITE}")
        return answers


def _outcomes(task: str, results: Mapping[str, Any], emit: Emit) -> dict[str, tuple[float, ...]]:
    """Outcomes of the questions of a task by metric, where the metric is their mean; a note for the others."""
    values: dict[str, list[Any]] = {}
    for sample in results["samples"][task]:
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    means = {}
    for name, column in values.items():
        short = name.removesuffix(",none")
        if len(column) > 1 and _is_mean(results["results"][task].get(name), column):
            means[short] = tuple(float(value) for value in column)
        else:
            emit(Noted(f"{task}: {short} is no mean over two questions or more, and is left out"))
    return means


def _is_mean(value: Any, column: Sequence[Any]) -> bool:
    numbers = all(isinstance(one, int | float) for one in column) and isinstance(value, int | float)
    return numbers and abs(sum(column) / len(column) - value) <= 1e-9 * max(1.0, abs(value))


def _digest(samples: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for task, asked in samples.items():
        for one in asked:
            digest.update(f"{task} {one['doc_hash']} {one['prompt_hash']} {one['target_hash']};".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the harness's log and progress bars, and its look at git and the machine: this package alone prints."""
    from lm_eval import evaluator
    from lm_eval.api import task as building

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            patch.object(building, "tqdm", partial(building.tqdm, disable=True)),
            patch.object(evaluator, "get_git_commit_hash", lambda: None),
            patch.object(evaluator, "add_env_info", lambda results: None),
        ):
            yield
    finally:
        logger.setLevel(level)
