"""Sequences that start with a BOS token, against computations of a few lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run, save_run_file
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aqlm_cli.data.sequences import calibration_sequences, evaluation_sequences, opening_tokens, recut
from aqlm_cli.errors import DataError
from aqlm_cli.runs.artifact import open_artifact

LENGTH = 32
LINES = [f"{number} times {number} is {number**2}." for number in range(60)]


def tokenizer(template: str = "$A", bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Of bytes, with the special tokens of `template` around a text."""
    made = tiny_models.byte_tokenizer()
    made.bos_token, made.eos_token = "<bos>" if bos else None, "<eos>" if eos else None
    special = [(name, index) for index, name in ((256, "<bos>"), (257, "<eos>"))]
    made._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return made


def adds_bos(directory: Path) -> Path:
    """The tokenizer of this model puts <bos> before a text from now on, as those of Gemma and Llama do."""
    tokenizer("<bos> $A").save_pretrained(directory)
    return directory


def file(directory: Path, lines: list[str] = LINES) -> str:
    path = directory / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


# ---------------------------------------------------------------------------------------------------------- which token


@pytest.mark.parametrize(
    ("template", "by_itself", "asked"),
    [
        ("$A", (), (256,)),
        ("$A <eos>", (), (256,)),
        ("<bos> $A", (256,), (256,)),
        ("<bos> $A <eos>", (256,), (256,)),
        ("<eos> <bos> $A", (257, 256), (257, 256)),
    ],
)
def test_a_sequence_starts_as_the_tokenizer_starts_a_text(
    template: str, by_itself: tuple[int, ...], asked: tuple[int, ...]
) -> None:
    assert opening_tokens(tokenizer(template), None) == by_itself
    assert opening_tokens(tokenizer(template), True) == asked
    assert opening_tokens(tokenizer(template), False) == ()


def test_a_tokenizer_without_a_bos_token_gives_no_opening() -> None:
    assert opening_tokens(tokenizer(bos=False), None) == ()
    with pytest.raises(DataError, match="no BOS token; choose --no-bos"):
        opening_tokens(tokenizer(bos=False), True)


# ------------------------------------------------------------------------------------------------------------ sequences


@pytest.mark.parametrize("opening", [[], [256], [257, 256]])
def test_calibration_sequences_are_the_opening_and_the_next_tokens(tmp_path: Path, opening: list[int]) -> None:
    found = calibration_sequences(file(tmp_path), 20, LENGTH, 3, tokenizer(), opening=opening).ids
    lines = LINES.copy()
    random.Random("3/documents").shuffle(lines)
    text = tokenizer().encode("<eos>".join(lines), add_special_tokens=False)
    step = LENGTH - len(opening)
    assert found.tolist() == [[*opening, *text[start : start + step]] for start in range(0, 20 * step, step)]


@pytest.mark.parametrize("opening", [[], [256], [257, 256]])
def test_evaluation_sequences_are_the_opening_and_the_next_tokens(tmp_path: Path, opening: list[int]) -> None:
    found = evaluation_sequences(file(tmp_path), LENGTH, tokenizer("<bos> $A"), opening=opening)
    text = tokenizer().encode("\n\n".join(LINES), add_special_tokens=False)
    text = text if opening else [256, *text]  # GPTQ's: as the tokenizer begins the whole text
    step = LENGTH - len(opening)
    rows = [[*opening, *text[start : start + step]] for start in range(0, len(text), step)]
    assert found.tolist() == [row for row in rows if len(row) == LENGTH]


def test_a_text_that_begins_with_the_token_itself_has_it_once(tmp_path: Path) -> None:
    name = file(tmp_path, ["<bos>" + "a" * 40 + "<bos>" + "b" * 40])
    for found in (
        calibration_sequences(name, 2, 41, 0, tokenizer(), opening=[256]).ids,
        evaluation_sequences(name, 41, tokenizer("<bos> $A"), opening=[256]),
    ):
        assert tokenizer().batch_decode(found) == ["<bos>" + "a" * 40, "<bos>" + "b" * 40]


def test_sequences_without_room_for_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sequences of 2 tokens leave no room for text"):
        evaluation_sequences(file(tmp_path), 2, tokenizer(), opening=[257, 256])


@pytest.mark.parametrize("before", [(), (256,)])
@pytest.mark.parametrize("after", [(), (256,)])
def test_sequences_are_cut_again_from_their_text(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    text = torch.arange(90)
    sequences = torch.cat([torch.tensor(before * 3, dtype=torch.int64).view(3, -1), text.view(3, 30)], 1)
    for length in (7, 30 + len(before)):
        step = length - len(after)
        expected = [[*after, *text[start : start + step].tolist()] for start in range(0, 90 - step + 1, step)]
        assert recut(sequences, length, before, after).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- perplexity


def sequences_by_hand(directory: Path, text: str, opening: list[int]) -> Tensor:
    ids = AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)
    step = LENGTH - len(opening)
    return torch.tensor([[*opening, *ids[start : start + step]] for start in range(0, 4 * step, step)])


@pytest.mark.parametrize(("template", "opening"), [("<bos> $A", [256]), ("<eos> <bos> $A", [257, 256])])
def test_every_token_of_the_text_after_the_opening_is_scored(tmp_path: Path, template: str, opening: list[int]) -> None:
    directory = tiny_models.save("gemma2", tmp_path / "model")
    tokenizer(template).save_pretrained(directory)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    command = ["eval-ppl", str(directory), "--data", str(tmp_path / "text.txt"), "--sequence-length", str(LENGTH)]
    result = run(*command, "--sequences", "4", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    network: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = sequences_by_hand(directory, "\n".join(LINES), opening)
    with torch.no_grad():
        chances = network(ids).logits.log_softmax(2)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert report["perplexity"] == pytest.approx(math.exp(-chances[:, len(opening) - 1 :].mean()), rel=1e-5)
    assert report["bos"] is True and "published figures mostly need --no-bos" in result.stderr
    without = json.loads(run(*command, "--sequences", "4", "--json", "--no-bos").stdout)
    assert without["bos"] is False and without["perplexity"] != report["perplexity"]


def test_the_switch_adds_bos_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    command = ["eval-ppl", str(directory), "--data", str(tmp_path / "text.txt"), "--sequence-length", str(LENGTH)]
    command += ["--sequences", "4"]
    perplexities = {}
    for flags in ((), ("--no-bos",), ("--bos",)):
        report = json.loads(run(*command, "--json", *flags).stdout)
        assert report["bos"] is ("--bos" in flags)
        perplexities[flags] = report["perplexity"]
    assert perplexities[()] == perplexities["--no-bos",] != perplexities["--bos",]


# ------------------------------------------------------------------------------------------------------------ artifacts


@pytest.fixture
def with_bos(run_file: Path) -> Path:
    return adds_bos(Path("tiny"))


def calibrated(*flags: str) -> Tensor:
    made = run("calibrate", "--config", "run.yaml", "--out", "run", *flags)
    assert made.exit_code == 0, made.output
    return load_file("run/calibration/windows.safetensors")["ids"].clone()


def test_calibration_starts_every_sequence_with_bos_and_refuses_other_settings(with_bos: Path) -> None:
    ids = calibrated()
    assert (ids[:, 0] == 256).all() and not (ids[:, 1:] == 256).any() and ids.shape == (8, 32)
    artifact = open_artifact(Path("run/calibration"), "calibration")
    assert artifact.manifest.settings["bos"] is True and artifact.manifest.results["bos"] is True
    assert "exists already" in run("calibrate", "--config", "run.yaml", "--out", "run").output
    line = refused("calibrate", "--config", "run.yaml", "--out", "run", "--no-bos")
    assert "calibrate.bos: None there, False here" in line
    assert not (calibrated("--no-bos", "--overwrite") == 256).any()


def test_a_calibration_from_before_bos_was_resolved_is_not_reused(with_bos: Path) -> None:
    calibrated("--no-bos")
    assert "bos" not in open_artifact(Path("run/calibration"), "calibration").manifest.settings
    path = Path("run/run.yaml")
    path.write_text(path.read_text().replace("  bos: false\n", ""))
    line = refused("calibrate", "--config", "run.yaml", "--out", "run")
    assert "settings.bos None there, True asked; add --overwrite" in line


def test_a_tokenizer_without_bos_leaves_the_artifact_unchanged(run_file: Path) -> None:
    ids = calibrated()
    assert not (ids == 256).any()
    assert "bos" not in open_artifact(Path("run/calibration"), "calibration").manifest.settings


def test_the_run_file_has_the_setting_of_each_stage(run_file: Path) -> None:
    text = run_file.read_text().replace("sequence_length: 32,", "sequence_length: 32, bos: true,")
    run_file.write_text(text.replace("sequence_length: 32}", "sequence_length: 32, bos: true}"))
    assert (calibrated()[:, 0] == 256).all()


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_a_switch_that_the_tokenizer_cannot_follow_is_one_line(command: str, run_file: Path) -> None:
    tokenizer(bos=False).save_pretrained("tiny")
    line = refused(command, "--config", "run.yaml", "--out", "run", "--bos")
    assert "has no BOS token; choose --no-bos, or `bos: false`" in line
    assert "has no BOS token" in refused("eval-ppl", "tiny", "--data", "notes.txt", "--sequence-length", "32", "--bos")


FINETUNE = ("--steps", "1", "--sequence-length", "16")


def test_finetuning_sequences_have_the_opening_of_calibration(tmp_path: Path, with_bos: Path) -> None:
    section = "finetune: {batch: 2, micro_batch: 2, held_out: 2, save_every: 1}\n"
    Path("run.yaml").write_text(Path("run.yaml").read_text() + section)
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    measured = run("eval-ppl", "run", "--data", "notes.txt", "--sequence-length", "32")
    assert "32, bos" in measured.output
    assert [path.name[-16:] for path in Path("run/reports").glob("eval-ppl-*")] == ["float32-bos.json"]
    assert run("finetune", "run", *FINETUNE).exit_code == 0
    assert open_artifact(Path("run/finetuned"), "quantized").manifest.settings["bos"] is True
    assert "settings.bos True there, None asked" in refused("finetune", "run", *FINETUNE, "--no-bos")
    told = json.loads(run("finetune", "run", *FINETUNE, "--data", "self:6", "--overwrite", "--json").stdout)
    assert told["finetune"]["text_tokens"] == (6 - 2) * 16
    ids = load_file("run/text/windows.safetensors")["ids"]
    assert (ids[:, 0] == 256).all() and not (ids[:, 1] == 256).any()
    assert json.loads(Path("run/text/manifest.json").read_text())["settings"]["bos"] is True


# --------------------------------------------------------------------------------------------------------- no end token


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_without_an_end_token_works_from_calibration_to_perplexity(tmp_path: Path, bos: bool) -> None:
    save_run_file(tmp_path)
    tokenizer(bos=bos, eos=False).save_pretrained(tmp_path / "tiny")
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("tiny", str(tmp_path / "tiny")))
    made = run("calibrate", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"))
    assert made.exit_code == 0, made.output
    between = "its BOS token" if bos else "nothing"
    assert f"no end-of-text token; {between} separates documents" in made.output
    command = ["eval-ppl", str(tmp_path / "tiny"), "--data", str(tmp_path / "notes.txt"), "--sequence-length", "32"]
    assert run(*command).exit_code == 0
