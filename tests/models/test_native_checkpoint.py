"""Native checkpoints in our own loader and in the compiled decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import native_files, tiny_models
from helpers.packing import logits, relative_rms

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, open_decoding, resolve
from aqlm_cli.models.quantization import is_native, is_quantized, refuse_quantized

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ATTENTION = {"q_proj": "2x8g8", "k_proj": "2x8g8", "v_proj": "3x8g8", "o_proj": "1x8g8"}
LAYERS = {**ATTENTION, "up_proj": "2x8g8", "gate_proj": "2x4g8", "down_proj": "4x8g8"}


@pytest.fixture(params=["untied", "tied"])
def packed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A model of which every matrix is quantized, and the dense network that it stands for."""
    monkeypatch.setattr(native_files, "SCHEMES", LAYERS)
    tied = request.param == "tied"
    original = tiny_models.save("llama", tmp_path / "original", tie_word_embeddings=tied)
    tables = {EMBEDDING: "3x8g8"} if tied else {EMBEDDING: "int4g64", HEAD: "2x8g8"}
    weights = native_files.save_native(original, tmp_path / "packed", tables)
    return tmp_path / "packed", native_files.dense_network(original, weights)


def test_our_loader_gives_the_network(packed: tuple[Path, Any]) -> None:
    directory, dense = packed
    source = resolve(str(directory))
    assert is_quantized(source) and is_native(source)
    assert relative_rms(logits(load_network(source, torch.float32)), logits(dense)) < 1e-5
    with pytest.raises(ModelError, match="is quantized already, with aqlm_native"):
        refuse_quantized(source)


@pytest.mark.slow
def test_the_decoder_reads_it_without_a_network(packed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, dense = packed
    monkeypatch.setattr("aqlm_cli.models.decoding.load_network", lambda *_: pytest.fail("a network was loaded"))
    decoding = open_decoding(resolve(str(directory)), 64)
    assert decoding.name.startswith("compiled decoder")
    ids = tiny_models.token_ids(1, 20)[0]
    with torch.no_grad():
        wanted = dense(ids[None]).logits[0]
    found = [decoding.prefill(ids[:12]), *(decoding.step(int(token)) for token in ids[12:])]
    assert relative_rms(torch.stack(found), wanted[11:]) < 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": None}, "lists no layers"),
        (
            {"layers": {"model.layers.99.q": {"scheme": "2x8g8", "kind": "additive", "duty": "linear"}}},
            "no such module",
        ),
        ({"layers": {"": {"scheme": "2x8g8", "kind": "additive", "duty": "expert"}}}, "."),
        ({"version": "1"}, "version '1'"),
        ({"layers": {"model": {"scheme": "2x8g8", "kind": "additive", "duty": "table"}}}, "has a LlamaModel"),
    ],
)
def test_an_untrusted_description_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    original = tiny_models.save("llama", tmp_path / "original")
    native_files.save_native(original, tmp_path / "packed")
    described = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    native_files.edit_config(tmp_path / "packed", quantization_config={**described, **changes})
    with pytest.raises(ModelError, match=message) as error:
        load_network(resolve(str(tmp_path / "packed")), torch.float32)
    assert "\n" not in str(error.value)
