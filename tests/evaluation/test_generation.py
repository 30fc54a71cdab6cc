from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_cli.errors import DataError
from aqlm_cli.evaluation import GenerationReport, GenerationSettings
from aqlm_cli.events import Event, Noted
from aqlm_cli.models import find_subject
from aqlm_cli.pipeline.stages.evaluate import evaluate
from aqlm_cli.runs.directory import open_run
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.run_file import build_config
from aqlm_kernels import KernelError

PROMPT = "The quick brown fox"


def generated(
    target: Path,
    prompt: str = PROMPT,
    temperature: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
    events: list[Event] | None = None,
) -> GenerationReport:
    emit = (events if events is not None else []).append
    report = evaluate(
        find_subject(str(target)),
        "generation",
        GenerationSettings(prompt, 12, temperature, seed, backend),
        "cpu",
        emit,
    )
    assert isinstance(report, GenerationReport)
    return report


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "model")


def test_greedy_text_is_the_likeliest_token_each_time(model: Path) -> None:
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    length = ids.shape[1]
    while ids.shape[1] < length + 12 and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
    report = generated(model)
    assert report.text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert report.tokens == ids.shape[1] - length
    assert (report.model, report.prompt) == (str(model), PROMPT)


def test_a_packed_llama_speaks_without_transformers_networks(model: Path, tmp_path: Path) -> None:
    tiny_models.save_additive(model, tmp_path / "packed")
    script = f"""
import sys
from aqlm_cli.models import resolve
from aqlm_cli.evaluation import EVALUATIONS, GenerationSettings, StoredModel
model = StoredModel(resolve({str(tmp_path / "packed")!r}))
found = EVALUATIONS["generation"].run(model, None, GenerationSettings({PROMPT!r}, 12), print)
slow = "transformers.modeling_utils", "datasets", "matplotlib"  # a second and more to import
print(found.decoding, [name for name in slow if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.search(r"compiled decoder, cpu-\S+ \[\]$", done.stdout.strip())


def test_greedy_text_does_not_depend_on_the_seed_and_drawn_text_does(model: Path) -> None:
    assert generated(model, seed=0).text == generated(model, seed=1).text
    assert generated(model, temperature=2.0, seed=0).text == generated(model, temperature=2.0, seed=0).text
    assert generated(model, temperature=2.0, seed=0).text != generated(model, temperature=2.0, seed=1).text


def test_drawing_leaves_the_generator_of_the_caller_alone(model: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generated(model, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_aqlm_checkpoint_generates_what_its_weights_generate(model: Path, tmp_path: Path) -> None:
    weights = tiny_models.save_additive(model, tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).float()
    for path, weight in weights.items():
        dense.get_submodule(path).weight.data = weight
    dense.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "dense")
    assert generated(tmp_path / "packed").text == generated(tmp_path / "dense").text != generated(model).text


def test_a_run_generates_with_what_it_has_packed_and_says_so(model: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", build_config(None, None, {"model": "not-looked-at"}))
    with run.stage(StageKey(PACK, {}, {})) as stage:
        tiny_models.save("qwen2", stage.directory)
        stage.publish({})
    events: list[Event] = []
    report = generated(run.path, events=events)
    assert report.text == generated(run.path / "packed").text
    assert events == [Noted(f"evaluating {run.path / 'packed'}")]
    assert report.decoding == "transformers"


def test_a_prompt_without_a_token_is_refused(model: Path) -> None:
    with pytest.raises(DataError, match="the prompt has no token"):
        generated(model, prompt="")


def test_a_tokenizer_that_begins_every_text_itself_needs_no_prompt(model: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(model)
    assert generated(model, prompt="").tokens > 0


def test_a_backend_is_not_forgotten_where_no_layer_is_packed(model: Path) -> None:
    with pytest.raises(KernelError, match="backend cpu-lut needs packed layers, and the model has none"):
        generated(model, backend="cpu-lut")
