"""Questions with choices: likelihoods against plain forward passes, accuracies by hand and by lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, tiny_models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from aqlm_cli.data.questions import Question
from aqlm_cli.errors import DataError, ModelError, UsageError
from aqlm_cli.evaluation import LoadedModel, TasksReport, TasksSettings
from aqlm_cli.evaluation.answers import scores_of
from aqlm_cli.evaluation.choices import Encoder
from aqlm_cli.evaluation.tasks import TasksEvaluation
from aqlm_cli.events import Event, Noted, silent

ANIMALS = ["cat", "dog", "horse", "bird", "fish", "wolf", "ant", "bee"]
QUESTIONS = [
    *(
        {"question": f"Animal {n} of the list is the", "choices": ANIMALS[: 2 + n % 7], "answer": n % 2}
        for n in range(26)
    ),
    {"question": "Choose a letter: ", "choices": ["A", "B", "C"], "answer": 2},
    {"question": "Two spaces  ", "choices": ["one long choice of words", "short"], "answer": 1},
    {"question": "Grüße aus", "choices": ["Köln", "Düsseldorf", "Zürich", "Rom"], "answer": 3},
    {"question": "", "choices": ["Begin here", "begin there"], "answer": 0},
]


class Model(LoadedModel):
    """A tiny model in float64."""

    def network(self, dtype: torch.dtype) -> Any:
        return super().network(torch.float64)


def made(directory: Path, family: str = "llama") -> Model:
    network = AutoModelForCausalLM.from_pretrained(tiny_models.save(family, directory), dtype=torch.float32)
    return Model("mine", network, tiny_models.byte_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(model: Model) -> Model:
    network = model.network(torch.float64)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
    return Model("other", network, model.loaded_tokenizer)


def save(directory: Path, questions: Sequence[dict[str, Any]]) -> str:
    path = directory / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return save(tmp_path, QUESTIONS)


def asked(model: LoadedModel, task: str, base: LoadedModel | None = None, **settings: Any) -> TasksReport:
    return TasksEvaluation().run(model, base, TasksSettings(task, **settings), silent)


def plain(model: Model, question: str, choice: str, longest: int = 256) -> float:
    """The log-likelihood of a choice by one forward pass; a token of this tokenizer is a byte."""
    tokens = list(f"{question} {choice}".encode())
    tokenizer = model.loaded_tokenizer
    ids = tokenizer.encode(f"{question} {choice}", add_special_tokens=False)
    assert len(ids) == len(tokens)
    ids = [*([] if question else [tokenizer.bos_token_id]), *ids]
    count = len(f"{question[len(question.rstrip()) :]} {choice}".encode())
    read = torch.tensor(ids[:-1])[-longest:]
    with torch.no_grad():
        logits = model.network(torch.float64)(read[None]).logits[0, -count:].log_softmax(1)
    return float(logits.gather(1, torch.tensor(ids[-count:])[:, None]).sum())


# ------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("rows_at_a_time", [3, 128])
def test_a_likelihood_is_the_sum_over_a_plain_forward_pass(
    rows_at_a_time: int, model: Model, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("scoring", "choices"):
        monkeypatch.setattr(f"aqlm_cli.evaluation.{module}.ROWS_PER_CHUNK", rows_at_a_time)
    report = asked(model, file)
    for question, found in zip(QUESTIONS, report.likelihoods, strict=True):
        expected = [plain(model, question["question"], choice) for choice in question["choices"]]
        assert found == pytest.approx(expected, abs=1e-6)
    changed = plain(model, QUESTIONS[0]["question"] + "!", "cat")
    assert report.likelihoods[0][0] != pytest.approx(changed, abs=1e-3)
    tokens = sum(len(f" {choice}".encode()) for question in QUESTIONS for choice in question["choices"])
    assert report.passport.scored == tokens + 3 + 2 * 2  # the spaces that end a question are the choices'
    # Letters follow the same tokens, which are read once.
    assert report.passport.sequences == sum(len(question["choices"]) for question in QUESTIONS) - 2


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_long_question_loses_its_beginning(family: str, tmp_path: Path) -> None:
    model, events = made(tmp_path / "model", family), list[Event]()
    questions = [
        {"question": "x" * 80 + "y" * 200, "choices": ["long", "short"], "answer": 0},
        {"question": "y" * (257 - 5), "choices": ["long", "tall"], "answer": 0},  # just fits: the last is not read
    ]
    report = TasksEvaluation().run(model, None, TasksSettings(save(tmp_path, questions)), events.append)
    for question, found in zip(questions, report.likelihoods, strict=True):
        expected = [plain(model, question["question"], choice) for choice in question["choices"]]  # type: ignore[arg-type, union-attr]
        assert found == pytest.approx(expected, abs=1e-6)
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert report.cut == 2
    assert notes == [
        "2 of 4 sequences are longer than the 256 tokens that mine reads; the beginning of their questions is left out"
    ]


def test_a_choice_longer_than_the_model_reads_is_refused(model: Model, tmp_path: Path) -> None:
    file = save(tmp_path, [QUESTIONS[0], {"question": "q", "choices": ["a", "b" * 256], "answer": 0}])
    with pytest.raises(DataError, match=r"questions.jsonl: line 2: choice 1 has 257 tokens, the model reads 256"):
        asked(model, file)


def test_tokens_are_those_of_question_and_choice_together() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    bos = tokenizer.bos_token_id

    def pair(text: str, choice: str) -> tuple[list[int], list[int]]:
        return Encoder(tokenizer).pair(Question(text, (choice, "other"), 0, "line 1"), choice)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    assert pair("Is it", "so") == (ids("Is it"), ids(" so"))
    assert pair("Is it", " so") == (ids("Is it"), ids(" so"))
    assert pair("Is it \n", "so") == (ids("Is it"), ids(" \n so"))
    assert pair("", "so") == ([bos], ids(" so"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    assert pair("Is it", "so") == ([bos, *ids("Is it")], ids(" so"))
    assert pair("<bos>Is it", "so") == ([bos, *ids("Is it")], ids(" so"))
    assert pair("", "so") == ([bos], ids(" so"))
    tokenizer.bos_token = None
    assert Encoder(tokenizer).pair(Question("", ("so", "a"), 0, ""), "so")[0] == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="line 1: `question` is empty, and the tokenizer has no BOS token; write one"):
        pair("", "so")


def test_likelihoods_that_are_not_numbers_are_refused(model: Model, file: str) -> None:
    network = model.network(torch.float64)
    with torch.no_grad():
        network.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(ModelError, match=r"broken: a log-likelihood \(.*line 1\) is not finite"):
        asked(Model("broken", network, model.loaded_tokenizer), file)


# ------------------------------------------------------------------------------------------------ accuracies and errors


def right(model: Model, by: str) -> list[float]:
    found = []
    for question in QUESTIONS:
        choices = question["choices"]
        sizes = {
            "acc": [1] * len(choices),
            "acc_norm": map(len, choices),
            "acc_bytes": [len(c.encode()) for c in choices],
        }
        scores = [plain(model, question["question"], c) / size for c, size in zip(choices, sizes[by], strict=True)]
        found.append(float(max(range(len(scores)), key=scores.__getitem__) == question["answer"]))
    return found


def test_accuracies_differences_and_errors_are_those_computed_by_hand(model: Model, other: Model, file: str) -> None:
    report, n = asked(other, file, model), len(QUESTIONS)
    assert [score.metric for score in report.scores] == ["acc", "acc_norm", "acc_bytes"]
    differing = 0
    for score in report.scores:
        own, base = right(other, score.metric), right(model, score.metric)
        p, q = sum(own) / n, sum(base) / n
        assert (score.task, score.questions, score.mean) == ("questions.jsonl", n, pytest.approx(p))
        assert score.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert score.base_model is not None and score.difference is not None
        assert (score.base_model.mean, score.base_model.stderr) == pytest.approx((q, math.sqrt(q * (1 - q) / (n - 1))))
        paired = [a - b for a, b in zip(own, base, strict=True)]
        differing += sum(map(abs, paired))
        assert score.difference.mean == pytest.approx(p - q)
        assert score.difference.stderr == pytest.approx(statistics.stdev(paired) / math.sqrt(n))
    assert differing > 0, "the two models answer alike: the test shows nothing"


def test_a_model_does_not_differ_from_itself(model: Model, file: str) -> None:
    report = asked(model, file, model)
    assert all(score.difference is not None and score.difference.mean == 0 for score in report.scores)
    assert all(score.difference is not None and score.difference.stderr == 0 for score in report.scores)
    assert all(score.base_model is None for score in asked(model, file).scores)


def test_all_tasks_together_count_each_question_once() -> None:
    own = {"a": {"acc": [1.0, 0.0], "f": [1.0, 1.0]}, "b": {"acc": [1.0, 1.0, 1.0, 0.0]}}
    scores = scores_of(own, None)
    assert [(score.task, score.metric, score.questions) for score in scores] == [
        ("a", "acc", 2),
        ("a", "f", 2),
        ("b", "acc", 4),
        ("all", "acc", 6),
    ]
    assert scores[-1].mean == pytest.approx(4 / 6)


def test_only_the_first_questions_are_asked_where_a_number_is_given(model: Model, file: str) -> None:
    whole, first = asked(model, file), asked(model, file, questions=5)
    assert first.likelihoods == whole.likelihoods[:5]
    assert {score.questions for score in first.scores} == {5}
    assert list(TasksEvaluation().files(first)) == ["eval-tasks-questions.jsonl-first5.json"]
    assert list(TasksEvaluation().files(whole)) == ["eval-tasks-questions.jsonl.json"]
    assert first.passport.column != whole.passport.column


def test_the_passport_tells_questions_apart(model: Model, other: Model, tmp_path: Path) -> None:
    column = asked(model, save(tmp_path, QUESTIONS)).passport.column
    assert asked(other, save(tmp_path, QUESTIONS)).passport.column == column
    changed = [{**QUESTIONS[0], "answer": 1}, *QUESTIONS[1:]]
    assert asked(model, save(tmp_path, changed)).passport.column != column
    assert asked(model, save(tmp_path, QUESTIONS), dtype="bfloat16").passport.column != column


def test_one_question_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one question gives no standard error; write at least two"):
        asked(model, save(tmp_path, QUESTIONS[:1]))


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_keeps_a_report_and_asks_the_base_model_once(finished_run: Path) -> None:
    save(Path(), QUESTIONS)
    arguments = ("evaluate", "run", "--kind", "tasks", "--tasks", "questions.jsonl", "--json")
    result = commands.run(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    kept = json.loads((finished_run / "reports" / "eval-tasks-questions.jsonl.json").read_text())
    assert kept.pop("quantized") and kept == report
    assert {"torch", "transformers", "aqlm-cli"} == report["passport"]["versions"].keys()
    assert report["scores"][0]["base_model"]["stderr"] > 0
    (base,) = (finished_run / "reports").glob("base-model-*.json")
    base.write_text(base.read_text().replace("1.0", "0.0"))  # what is kept is not computed again
    again = json.loads(commands.run(*arguments).stdout)
    assert again["scores"][0]["base_model"]["mean"] == 0
    assert again["scores"][0]["mean"] == report["scores"][0]["mean"]
    shown = commands.run("evaluate", "run", "--kind", "tasks", "--tasks", "questions.jsonl", "--sequences", "4")
    assert "acc_norm" in shown.output and "difference" in shown.output


def test_a_command_without_questions_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    refused = commands.refused("evaluate", "nosuch", "--kind", "tasks", status=2)
    assert "the kind tasks asks questions; name them with --tasks FILE_OR_NAME, or as evaluate.tasks" in refused
    file = save(tmp_path, QUESTIONS)
    refused = commands.refused("evaluate", "nosuch", "--tasks", file, status=2)
    assert "--tasks is for the kind tasks; add it to --kind" in refused
    Path(file).write_text('{"question": "q"}\n')
    refused = commands.refused("evaluate", "nosuch", "--kind", "ppl,tasks", "--tasks", file)
    assert f"{file}: line 1 has no `choices`" in " ".join(refused.split())


def test_a_name_without_the_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused = commands.refused("evaluate", "nosuch", "--kind", "tasks", "--tasks", "arc_easy", status=2)
    assert "arc_easy is no file of questions; if it is a task of lm-evaluation-harness, install that" in refused
    assert 'pip install "aqlm-cli[eval]"' in refused


# -------------------------------------------------------------------------------------------- lm-evaluation-harness

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}, {{metric: mcc}}]
"""

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@harness
@pytest.mark.slow
def test_the_harness_finds_the_same_accuracies(
    model: Model, other: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [*QUESTIONS, {"question": "z" * 300, "choices": ["long", "short"], "answer": 0}]
    file, task, events = save(tmp_path, questions), tmp_path / "task.yaml", list[Event]()
    task.write_text(TASK.format(name="local_questions", file=file))
    theirs = TasksEvaluation().run(other, model, TasksSettings(str(task)), events.append)
    ours = asked(other, file, model)
    assert {score.task for score in theirs.scores} == {"local_questions"}
    for own, same in zip(ours.scores, theirs.scores, strict=True):
        assert (own.metric, own.questions) == (same.metric, same.questions)
        assert (own.mean, own.stderr) == pytest.approx((same.mean, same.stderr))
        assert own.base_model == same.base_model and own.difference == same.difference
    assert ours.outcomes["questions.jsonl"] == theirs.outcomes["local_questions"]
    assert (ours.cut, ours.passport.scored) == (theirs.cut, theirs.passport.scored) and theirs.cut == 2
    assert "lm-eval" in theirs.passport.protocol and "lm-eval" in theirs.passport.versions
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert "local_questions: mcc is no mean over two questions or more, and is left out" in notes
    assert capsys.readouterr().out == "" and model.loaded_tokenizer.pad_token is None
    assert theirs.passport.sequences == sum(len(question["choices"]) for question in questions)
    first = asked(other, str(task), questions=4)
    assert {score.questions for score in first.scores} == {4}
    assert list(TasksEvaluation().files(first)) == ["eval-tasks-task.yaml-first4.json"]


@harness
@pytest.mark.slow
def test_unknown_names_missing_data_and_broken_weights_are_one_clear_line(model: Model, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"nosuch is neither a file nor a task of lm-eval [\d.]+; see `lm-eval ls tasks`"
    ):
        asked(model, "nosuch")
    task = tmp_path / "task.yaml"
    task.write_text(TASK.format(name="missing", file=tmp_path / "nosuch.jsonl"))
    with pytest.raises(DataError, match=r"task\.yaml could not be read: .*nosuch\.jsonl"):
        asked(model, str(task))
    task.write_text(TASK.format(name="questions", file=save(tmp_path, QUESTIONS)))
    network = model.network(torch.float64)
    with torch.no_grad():
        network.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(ModelError, match="broken: a log-likelihood is not finite; the weights hold NaN"):
        asked(Model("broken", network, model.loaded_tokenizer), str(task))
