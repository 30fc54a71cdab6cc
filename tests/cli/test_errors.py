"""Every mistake that the manual names, made on the command line: one line, the right status, nothing published half."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from aqlm_cli.errors import ArtifactError
from aqlm_cli.models import source as model_source
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.runs.directory import is_run
from aqlm_cli.runs.stages import kinds

RUN = Path("runs/tiny-2x4g8")


@pytest.fixture
def quantized(finished_run: Path) -> None:
    """A finished run where the command puts it by itself."""
    RUN.parent.mkdir()
    finished_run.rename(RUN)


def test_a_message_is_one_printable_line_whatever_it_quotes() -> None:
    assert str(ArtifactError("a\nb\u2028c\x1b[31m\ud800")) == "a b c\\x1b[31m\\ud800"
    assert len(str(ArtifactError("x" * 10**6))) < 5000


def published() -> dict[str, bytes]:
    """The files of all artifacts of the run, checked by their manifests, which tell times and so are left out."""
    found: dict[str, bytes] = {}
    for kind in kinds() if is_run(RUN) else ():
        if (RUN / kind).exists():
            files = open_artifact(RUN / kind, kind).manifest.files
            found |= {f"{kind}/{name}": (RUN / kind / name).read_bytes() for name in files}
    return found


def change_tensor(name: str, value: float) -> None:
    tensors = load_file("tiny/model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, "tiny/model.safetensors", {"format": "pt"})


# -------------------------------------------------------------------------------------------------------------- models

ANSWER = MagicMock()  # of whichever HTTP library the hub's client uses


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.RepositoryNotFoundError("a\nb", response=ANSWER), "someone/model exists neither locally nor on the hub"),
        (hub.GatedRepoError("a\nb", response=ANSWER), "accept its terms at https://huggingface.co/someone/model"),
        (hub.LocalEntryNotFoundError("a\nb"), "local directory, a .gguf file, or smollm2-135m"),
    ],
    ids=["unknown", "gated", "no connection"],
)
@pytest.mark.parametrize("command", [["quantize", "--bits", "2"], ["eval-ppl"], ["generate", "--prompt", "Hello"]])
def test_a_model_that_cannot_be_had(
    error: Exception, words: str, command: list[str], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(model_source, "snapshot_download", refuse)
    assert words in refused(*command, "someone/model")
    assert not Path("runs").exists()


def test_a_model_that_is_no_language_model(run_file: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    Path("tiny/config.json").write_text(json.dumps(config))
    assert "not a decoder-only language model but BertForMaskedLM" in refused("quantize", "--config", "run.yaml")


def test_a_model_of_which_nothing_can_be_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.save("gpt2", tmp_path / "conv", n_embd=16, n_layer=2, n_head=2)
    line = refused("quantize", "conv", "--bits", "2")
    assert "nothing is left to quantize" in line and "Conv1D" in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.mlp.down_proj.weight", torch.nan, "model.layers.1.mlp.down_proj: the weight holds NaN"),
        (
            "model.layers.0.post_attention_layernorm.weight",
            torch.nan,
            "model.layers.0.post_attention_layernorm: the weight holds NaN",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            1e30,
            "model.layers.1.self_attn.q_proj: its inputs hold NaN or infinite",
        ),
    ],
    ids=["weights", "activations", "overflow"],
)
def test_numbers_that_are_none_name_the_layer(run_file: Path, name: str, value: float, words: str) -> None:
    change_tensor(name, value)
    assert words in refused("quantize", "--config", "run.yaml")
    assert not any("quantized" in path for path in published())


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("bits", "neighbours"), [("2.2", "2 (2x8g8) and 2.5 (5x8g16)"), ("0.5", "1 (1x8g8)"), ("5", "4 (4x8g8)")]
)
def test_bits_out_of_range_name_their_neighbours_and_the_flag_that_says_it_exactly(bits: str, neighbours: str) -> None:
    assert f"nearest: {neighbours}; or say it exactly with --scheme" in refused(
        "quantize", "tiny", "--bits", bits, status=2
    )


def test_an_unknown_key_in_a_run_file_is_named_with_the_file_and_the_nearest_one(run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace("scheme:", "shceme:"))
    line = f"error: {run_file}: unknown key `quantize.shceme`; nearest valid key is `quantize.scheme`\n"
    assert refused("quantize", "--config", str(run_file)) == refused("run", str(run_file)) == line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheme", "3x4g8"], "quantize.scheme: 2x4g8 there, 3x4g8 here"),
        (["other"], "model: tiny there, other here"),
        (["--seed", "7"], "seed: 0 there, 7 here"),
    ],
)
def test_a_run_directory_of_other_settings_is_refused_and_left_alone(
    quantized: None, flags: list[str], words: str
) -> None:
    tiny_models.save("llama", Path("other"))
    before = published() | {"run.yaml": (RUN / "run.yaml").read_bytes()}
    line = refused("quantize", "--config", "run.yaml", "--out", str(RUN), *flags)
    assert words in line and "--overwrite" in line
    assert published() | {"run.yaml": (RUN / "run.yaml").read_bytes()} == before


def test_a_model_that_is_no_longer_the_one_of_the_run_is_refused(quantized: None) -> None:
    change_tensor("model.norm.weight", 3.0)
    for command in (["pack", str(RUN), "--overwrite"], ["eval-ppl", str(RUN)], ["bench", str(RUN)]):
        assert "was made from sha256:" in refused(*command)


def test_a_checkpoint_of_an_earlier_quantization_is_not_measured(quantized: None) -> None:
    assert run("calibrate", "--config", "run.yaml", "--seed", "1", "--overwrite").exit_code == 0
    line = refused("eval-ppl", str(RUN))
    assert (
        "was made from calibration" in line and f"aqlm quantize --config {RUN}/run.yaml --out {RUN} --overwrite" in line
    )


@pytest.mark.parametrize(("device", "words"), [("cuda:9", "torch finds"), ("tpu", "choose cpu, cuda or cuda:NUMBER")])
def test_a_device_that_is_not_there(run_file: Path, device: str, words: str) -> None:
    assert words in refused("quantize", "--config", "run.yaml", "--device", device, status=2)


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("notes.txt:96", " sequences of 32 tokens, 96 are needed; lower"),
        ("blank.txt:4", "blank.txt has no text"),
        ("nowhere.txt:4", "unknown text source 'nowhere.txt'; choose wikitext2, c4, redpajama, builtin, or a file"),
    ],
    ids=["too few tokens", "no token", "no file"],
)
def test_text_that_does_not_serve(run_file: Path, data: str, words: str) -> None:
    Path("blank.txt").write_text(" \n ")
    assert words in refused("quantize", "--config", "run.yaml", "--data", data)
    assert published() == {}


def test_a_text_without_a_token_cannot_be_measured_or_continued(run_file: Path) -> None:
    Path("blank.txt").write_text(" \n ")
    assert "blank.txt has no text" in refused("eval-ppl", "tiny", "--data", "blank.txt", "--sequence-length", "32")
    assert "the prompt has no token" in refused("generate", "tiny", "--prompt", "")


@pytest.mark.parametrize("command", [["calibrate"], ["quantize"], ["eval-ppl", "tiny", "--sequence-length", "32"]])
def test_without_a_connection_the_line_names_the_texts_that_need_none(
    run_file: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    flags = ["--config", "run.yaml", "--data", "c4:4"] if len(command) == 1 else ["--data", "wikitext2"]
    assert "`builtin` or a local file (.txt, " in refused(*command, *flags)
    assert published() == {}


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture(scope="module")
def writes(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a whole run, in an empty home, sees to it that a file is on the disk."""
    sync, calls, directory = os.fsync, list[int](), tmp_path_factory.mktemp("writes")
    shutil.copytree(workspace, directory, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("HOME", str(directory))
        patch.setattr(os, "fsync", lambda descriptor: calls.append(descriptor) or sync(descriptor))
        assert run("quantize", "--config", "run.yaml").exit_code == 0
    return len(calls)


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left on device"), (errno.EROFS, "read-only")])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_disk_that_fails_on_the_way_publishes_nothing_half_and_the_next_try_resumes(
    quantized: None,
    writes: int,
    fail_disk: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    words: str,
    share: float,
) -> None:
    expected, sync = published(), os.fsync
    shutil.rmtree(RUN)
    fail_disk(code, int(share * writes))
    assert words in refused("quantize", "--config", "run.yaml")
    assert published().items() <= expected.items()
    assert published() != expected
    monkeypatch.setattr(os, "fsync", sync)
    assert run("quantize", "--config", "run.yaml").exit_code == 0
    assert published() == expected


@pytest.mark.parametrize("command", [["eval-ppl", str(RUN)], ["bench", str(RUN)]])
def test_a_report_that_cannot_be_written(
    quantized: None, fail_disk: Callable[[int, int], None], command: list[str]
) -> None:
    before = published()
    fail_disk(errno.ENOSPC, 0)
    assert "no space left on device" in refused(*command)
    assert [path.name for path in (RUN / "reports").iterdir()] == ["forecast.json"]
    assert published() == before


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "small", "--data", "notes.txt:4", "--sequence-length", "16", "--out", "new"),
        ("eval-ppl", "small", "--data", "notes.txt", "--sequence-length", "16"),
        ("generate", "small", "--prompt", "two words"),
    ],
)
def test_the_tokenizer_of_a_larger_model_is_refused(command: tuple[str, ...], run_file: Path) -> None:
    tiny_models.save("llama", Path("small"), vocab_size=100)
    assert "small: token id 2" in refused(*command)
    assert not Path("new/calibration").exists()
