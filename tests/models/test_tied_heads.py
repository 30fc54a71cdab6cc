"""Head and embeddings as files hold them, whatever config.json says: transformers' own network says what is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from helpers import tiny_models
from helpers.packing import packed, quantized_run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli.errors import ModelError
from aqlm_cli.evaluation import EVALUATIONS, SpeedSettings, StoredModel
from aqlm_cli.models import load_network, open_decoding, resolve
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.spec.evaluate import BenchConfig
from aqlm_cli.spec.run_file import build_config

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
PROMPT, TOKENS = 6, 8


def own_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One that was trained apart, in 16 bits."""
    draw = torch.Generator().manual_seed(1)
    return {**tensors, HEAD: (0.1 * torch.randn(tensors[EMBEDDINGS].shape, generator=draw)).half().float()}


def stored_twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDINGS].clone()}


def under_the_heads_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {HEAD if name == EMBEDDINGS else name: tensor for name, tensor in tensors.items()}


KINDS: dict[str, tuple[bool, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "tied": (True, dict),
    "tied, stored twice": (True, stored_twice),
    "tied, a head of its own": (True, own_head),
    "tied, under the head's name": (True, under_the_heads_name),
    "untied": (False, own_head),
    "untied, stored twice": (False, stored_twice),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """In the inference package's own kernel all threads add into one vector."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def edited(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What `quantized_run` needs for a model of the kind: its tensors in 16 bits, and its config."""
    tied, edit = KINDS[request.param]
    file = tiny_models.save("llama", tmp_path / "first", tie_word_embeddings=True) / "model.safetensors"
    tensors = {name: tensor.half().float() for name, tensor in load_file(file).items()}
    return {"edited": edit(tensors), "tie_word_embeddings": tied, "skip": ["lm_head"]}


def greedy(directory: Path, ids: Tensor) -> tuple[Tensor, list[int], str]:
    """The logits of what follows the prompt and after each of our own tokens, these tokens, and what computed them."""
    decoding = open_decoding(resolve(str(directory)), PROMPT + TOKENS)
    logits = [decoding.prefill(ids[0])]
    for _ in range(TOKENS - 1):
        logits.append(decoding.step(int(logits[-1].argmax())))
    return torch.stack(logits), [int(row.argmax()) for row in logits], decoding.name


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() < 1e-3 * wanted.norm())


@pytest.mark.usefixtures("one_thread")
def test_the_head_is_what_transformers_takes_for_it(edited: dict[str, Any], tmp_path: Path) -> None:
    run, _ = quantized_run(tmp_path, **edited)
    report, ids = packed(run), tiny_models.token_ids(1, PROMPT)
    for directory, compiled in ((Path(run.config.model), False), (report.directory, True)):
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ends = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        wanted = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, **ends)
        expected = stock(wanted).logits[0, PROMPT - 1 : -1]
        logits, tokens, name = greedy(directory, ids)
        assert name.startswith("compiled decoder") is compiled
        assert tokens == wanted[0, PROMPT:].tolist()
        assert close(logits, expected) and not close(logits.flip(1), expected)
        assert close(load_network(resolve(str(directory)), torch.float32)(wanted).logits[0, PROMPT - 1 : -1], expected)
    config = build_config(None, None, {"model": run.config.model, "quantize": {"scheme": "2x8g8"}})
    known = make_job(config, run.path).preflight
    stored = sum(tensor.numel() for tensor in edited["edited"].values())
    assert known.plan.bytes_before == 2 * stored, "every tensor that the files hold"
    assert known.plan.bytes_after == report.bytes
    assert known.packed_bytes == (report.directory / "model.safetensors").stat().st_size
    assert known.shape.outside + sum(block.parameters for block in known.shape.blocks) == stored


def test_bytes_of_a_decode_step_count_a_head_once_and_one_row_of_the_embeddings(
    edited: dict[str, Any], tmp_path: Path
) -> None:
    run, _ = quantized_run(tmp_path, **edited)
    directory = packed(run).directory
    chosen = BenchConfig.model_validate({"prompt": PROMPT, "tokens": 2, "repeats": 1})
    model = StoredModel(resolve(str(directory)))
    report = EVALUATIONS["speed"].run(model, None, SpeedSettings(chosen), lambda event: None)
    matrix = load_file(directory / "model.safetensors").get(HEAD, torch.zeros(258, 64)).numel()
    network = load_network(model.source, torch.float32)
    row = 0 if network.lm_head.weight is network.model.embed_tokens.weight else 64
    one = 2 * (matrix - row) if {HEAD, EMBEDDINGS} <= edited["edited"].keys() else 0
    assert report.read_bandwidth / report.rows[-1].decode_bound == pytest.approx(report.rows[-1].bytes - one)
    assert (report.rows[-1].relative_error or 0) < 1e-3


def test_a_missing_head_is_named_where_config_json_ties_nothing(tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "model", tie_word_embeddings=False)
    tiny_models.save_additive(original, tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != HEAD}, path, {"format": "pt"})
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ModelError, match=r"lacks the tensor lm_head\.weight"):
        open_decoding(resolve(str(tmp_path / "packed")), PROMPT)
