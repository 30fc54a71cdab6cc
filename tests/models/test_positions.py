"""More tokens than a model has positions: transformers' own forward says where each family ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import commands, tiny_models

from aqlm_cli.errors import ModelError
from aqlm_cli.models import decoding_of, load_network, refuse_longer_than_stated, refuse_too_long, resolve

STATED = 32

WIDE: Mapping[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "pad_token_id": 0}
ENCODER_TOO: Mapping[str, Any] = {
    **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 8, "pad_token_id": 0},
    **{"decoder_attention_heads": 8, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128},
}

ENDING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("n_positions", WIDE),
    "gpt_bigcode": ("n_positions", WIDE),
    "gptj": ("n_positions", {**WIDE, "rotary_dim": 8}),
    "codegen": ("n_positions", {**WIDE, "rotary_dim": 8}),
    "ctrl": ("n_positions", {**WIDE, "dff": 128}),
    "openai-gpt": ("n_positions", WIDE),
    "mpt": ("max_seq_len", WIDE),
    "opt": ("max_position_embeddings", {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neo": ("max_position_embeddings", {**WIDE, "attention_types": [[["global", "local"], 1]]}),
    "biogpt": ("max_position_embeddings", {**WIDE, "intermediate_size": 128}),
    "xlm": ("max_position_embeddings", WIDE),
    "bert": ("max_position_embeddings", {**WIDE, "intermediate_size": 128, "is_decoder": True}),
    "roberta": ("max_position_embeddings", {**WIDE, "intermediate_size": 128, "is_decoder": True}),
    "bart": ("max_position_embeddings", ENCODER_TOO),
    "whisper": ("max_target_positions", ENCODER_TOO),
}
"""Families with a table of positions: what config.json calls its length, and a tiny shape."""

DECODED = ("gpt2", "gpt_bigcode", "gptj", "codegen", "ctrl", "mpt", "opt", "gpt_neo", "biogpt")
"""Those of them that generate with a cache of keys and values."""

ENDLESS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "xglm": {**WIDE, "ffn_dim": 128, "max_position_embeddings": STATED},  # its table grows
    "bloom": WIDE,
    "falcon": {**WIDE, "alibi": True},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "context_length": STATED},
}


def saved(family: str, directory: Path) -> Path:
    key, settings = ENDING.get(family, ("max_position_embeddings", ENDLESS.get(family, {})))
    return tiny_models.save(family, directory, **{**settings, **({key: STATED} if family in ENDING else {})})


def computes(directory: Path, tokens: int) -> bool:
    """Whether the network itself does, of tokens that are no padding."""
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    try:
        network(input_ids=torch.arange(tokens)[None] % 100 + 1, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", ENDING)
def test_as_many_tokens_as_the_network_accepts_are_allowed_and_no_more(family: str, tmp_path: Path) -> None:
    directory = saved(family, tmp_path / "model")
    source, longest = resolve(str(directory)), STATED - (family == "roberta")  # its table begins behind the padding
    assert computes(directory, longest) and not computes(directory, longest + 1)
    refuse_too_long(source, longest, "--tokens")
    for more in (longest + 1, 3 * STATED):
        line = rf"accepts {longest} tokens, not {more}; lower --tokens \(config.json: {ENDING[family][0]} {STATED}\)"
        with pytest.raises(ModelError, match=line):
            refuse_too_long(source, more, "--tokens")


@pytest.mark.parametrize("family", ENDLESS)
def test_positions_that_are_computed_have_no_end(family: str, tmp_path: Path) -> None:
    directory = saved(family, tmp_path / "model")
    assert computes(directory, 300)
    refuse_too_long(resolve(str(directory)), 300, "--tokens")


def test_measurements_stay_within_the_length_of_config_json(tmp_path: Path) -> None:
    source = resolve(str(saved("xglm", tmp_path / "model")))
    refuse_longer_than_stated(source, STATED, "--tokens")
    with pytest.raises(ModelError, match=f"accepts {STATED} tokens, not {STATED + 1}"):
        refuse_longer_than_stated(source, STATED + 1, "--tokens")


def test_a_table_too_long_to_be_tried_is_as_long_as_config_json_says(tmp_path: Path) -> None:
    source = resolve(
        str(tiny_models.save("opt", tmp_path / "model", **{**ENDING["opt"][1], **{"max_position_embeddings": 9000}}))
    )
    refuse_too_long(source, 9000, "--tokens")
    with pytest.raises(ModelError, match="accepts 9000 tokens, not 9001"):
        refuse_too_long(source, 9001, "--tokens")


@pytest.mark.parametrize("family", DECODED)
def test_a_text_continues_to_the_last_position(family: str, tmp_path: Path) -> None:
    network = load_network(resolve(str(saved(family, tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids(1, STATED)
    decoding = decoding_of(network, STATED)
    decoding.prefill(ids[0, :-2])
    found = [decoding.step(token) for token in ids[0, -2:].tolist()][-1]
    expected = network(input_ids=ids, use_cache=False).logits[0, -1]
    assert (found - expected).norm() < 1e-4 * expected.norm()


RUN_FILE = """
model: tiny
threads: 1
calibrate: {{data: "notes.txt:6", sequence_length: {calibrate}, statistics_sequences: 2}}
quantize: {{statistics_sequences: 4, scheme: 2x4g8, aqlm: {{rounds: 1, ldlq_rounds: 1}}, fit: {{epochs: 0}}}}
finetune: {{sequence_length: {finetune}}}
eval_ppl: {{data: [notes.txt], sequence_length: {eval_ppl}}}
bench: {{tokens: 2, prompt: {bench}}}
"""


def test_every_command_refuses_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved("gptj", Path("tiny"))
    Path("notes.txt").write_text("".join(f"{number} is {number}. " for number in range(200)))
    lengths = {"calibrate": 16, "finetune": 16, "eval_ppl": 16, "bench": 16}
    Path("run.yaml").write_text(RUN_FILE.format(**lengths))
    assert commands.run("quantize", "tiny", "--config", "run.yaml", "--out", "run").exit_code == 0
    load: Any = transformers.PreTrainedModel.from_pretrained

    def without_files(kind: type, name: Any, *arguments: Any, **options: Any) -> Any:
        """What is tried on the meta device has no name."""
        return pytest.fail("weights are read") if name is not None else load.__func__(kind, name, *arguments, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(without_files))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights are read")
    )
    window = ("--sequence-length", "33")
    for arguments in (
        ("plan", "tiny", *window),
        ("calibrate", "tiny", "--data", "notes.txt:6", *window, "--out", "other"),
        ("quantize", "tiny", "--data", "notes.txt:6", *window, "--out", "other"),
        ("eval-ppl", "tiny", "--data", "notes.txt", *window),
        ("eval-ppl", "run", "--data", "notes.txt", *window),
        ("generate", "tiny", "--prompt", "a" * 30, "--tokens", "4"),
        ("generate", "run", "--prompt", "a" * 30, "--tokens", "4"),
        ("bench", "tiny", "--prompt", "30", "--tokens", "3"),
        ("finetune", "run", *window),
        ("finetune", "run", "--data", "self:8", *window),
    ):
        line = commands.refused(*arguments)
        assert "accepts 32 tokens, not 33; lower --" in line and "(config.json: n_positions 32)" in line, arguments
    for section in lengths:
        Path("run.yaml").write_text(RUN_FILE.format(**{**lengths, section: 33}))
        assert "accepts 32 tokens, not 3" in commands.refused("run", "run.yaml", "--out", "other"), section
    assert not Path("other/calibration").exists()
