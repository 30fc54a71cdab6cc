"""Every protocol against a computation of its own: plain loops over what a network of transformers returns."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import tiny_models
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aqlm_cli.data.sources import builtin_texts
from aqlm_cli.errors import DataError, ModelError, UsageError
from aqlm_cli.evaluation import LoadedModel, PerplexityReport, PerplexitySettings, protocols
from aqlm_cli.evaluation.perplexity import PerplexityEvaluation
from aqlm_cli.events import silent
from aqlm_cli.models import load_network, load_tokenizer, resolve
from aqlm_cli.spec.evaluate import ProtocolName

DOCUMENTS = [
    "One line of text with a few words.\n",
    "".join(f"{n} times {n} is {n**2}. " for n in range(17)) + "\n",
    "   \n",
    "The  last one,\nwith white space; no word is like another.\n",
]


class Model(LoadedModel):
    """A tiny model in float64."""

    def network(self, dtype: torch.dtype) -> Any:
        return super().network(torch.float64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tiny_models.save("llama", tmp_path_factory.mktemp("model"))
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return Model("mine", network, tiny_models.byte_tokenizer())


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return str(path)


def measured(model: LoadedModel, base: LoadedModel | None = None, **settings: Any) -> PerplexityReport:
    return PerplexityEvaluation().run(model, base, PerplexitySettings(**settings), silent)


def tokens_of(model: LoadedModel) -> torch.Tensor:
    return torch.tensor(model.loaded_tokenizer.encode("\n\n".join(DOCUMENTS), add_special_tokens=False))


def logits_of(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.network(torch.float64)(ids[None]).logits[0]


# ------------------------------------------------------------------------------------- the protocols, computed plainly


def by_gptq(model: LoadedModel, length: int) -> float:
    tokens = tokens_of(model)
    losses = []
    for start in range(0, len(tokens) - length + 1, length):
        window = tokens[start : start + length]
        losses.append(F.cross_entropy(logits_of(model, window)[:-1], window[1:]))
    return math.exp(torch.stack(losses).mean())


def by_llama_cpp(model: LoadedModel, length: int, bos: int | None) -> float:
    tokens = tokens_of(model)[:-1]  # the file's last newline is dropped
    if bos is not None:
        tokens = torch.cat([torch.tensor([bos]), tokens])
    total, count = 0.0, 0
    for chunk in range(len(tokens) // length):
        window = tokens[chunk * length : (chunk + 1) * length].clone()
        if bos is not None:
            window[0] = bos
        logits = logits_of(model, window).log_softmax(1)
        for j in range(length // 2, length - 1):
            total, count = total - float(logits[j, window[j + 1]]), count + 1
    return math.exp(total / count)


def by_transformers(model: LoadedModel, length: int, stride: int) -> float:
    tokens, network, previous_end, nll_sum, n_tokens = tokens_of(model), model.network(torch.float64), 0, 0.0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        ids = tokens[None, begin:end]
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        counted = int((labels != -100).sum()) - 1
        with torch.no_grad():
            nll_sum += counted * F.cross_entropy(network(ids).logits[0, :-1], labels[0, 1:]).item()
        n_tokens, previous_end = n_tokens + counted, end
        if end == len(tokens):
            break
    return math.exp(nll_sum / n_tokens)


def by_words(model: LoadedModel, length: int) -> tuple[float, float]:
    tokenizer, total, words, size = model.loaded_tokenizer, 0.0, 0, 0
    for document in DOCUMENTS:
        if not document.strip():
            continue
        tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)])
        for first in range(1, len(tokens), length):
            end = min(first + length, len(tokens))
            read = tokens[max(0, end - 1 - length) : end - 1]
            logits = logits_of(model, read)[-(end - first) :]
            total += float(F.cross_entropy(logits, tokens[first:end], reduction="sum"))
        words, size = words + len(re.split(r"\s+", document)), size + len(document.encode())
    return math.exp(total / words), math.exp(total / size)


# --------------------------------------------------------------------------------------------------------- equality


def put(monkeypatch: pytest.MonkeyPatch, protocol: protocols.Protocol) -> str:
    monkeypatch.setitem(protocols.PROTOCOLS, protocol.name, protocol)  # type: ignore[arg-type]
    return protocol.name


SHORT: list[tuple[protocols.Protocol, Callable[[LoadedModel], float]]] = [
    (protocols.gptq(48), lambda model: by_gptq(model, 48)),
    (protocols.llama_cpp(32), lambda model: by_llama_cpp(model, 32, None)),
    (protocols.strided(64, 16), lambda model: by_transformers(model, 64, 16)),
    (protocols.strided(40, 40), lambda model: by_transformers(model, 40, 40)),
    (protocols.word(32), lambda model: by_words(model, 32)[0]),
]


@pytest.mark.parametrize(("protocol", "by_itself"), SHORT, ids=lambda one: getattr(one, "name", ""))
@pytest.mark.parametrize("rows_at_a_time", [7, 128])
def test_a_protocol_is_what_its_plain_loop_computes(
    protocol: protocols.Protocol,
    by_itself: Callable[[LoadedModel], float],
    rows_at_a_time: int,
    model: Model,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aqlm_cli.evaluation.scoring.ROWS_PER_CHUNK", rows_at_a_time)
    report = measured(model, data=text, protocol=put(monkeypatch, protocol))
    assert report.perplexity == pytest.approx(by_itself(model), rel=1e-6)
    assert report.protocol == report.passport.protocol == protocol.name


class RealModel(LoadedModel):
    """In float32, whatever is asked for."""

    def network(self, dtype: torch.dtype) -> Any:
        return super().network(torch.float32)


NAMED: dict[str, Callable[[LoadedModel], float]] = {
    "gptq-2048": lambda model: by_gptq(model, 2048),
    "aqlm-4096": lambda model: by_gptq(model, 4096),
    "llama3-8192": lambda model: by_gptq(model, 8192),
    "llamacpp-512": lambda model: by_llama_cpp(model, 512, None),
    "strided-2048/512": lambda model: by_transformers(model, 2048, 512),
    "word": lambda model: by_words(model, 2048)[0],
}


@pytest.mark.soak
@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_protocol_of_a_real_model_is_what_its_plain_loop_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve("smollm2-135m")
    model = RealModel("smollm2-135m", load_network(source, torch.float32), load_tokenizer(source))
    documents, path = list[str](), tmp_path / "text.jsonl"
    for text in builtin_texts("calibration"):
        documents.append(text[: 40_000 - len("".join(documents))])  # 9,000 tokens or so
        if len("".join(documents)) == 40_000:
            break
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    monkeypatch.setattr(sys.modules[__name__], "DOCUMENTS", documents)
    found = measured(model, data=str(path), protocol=name).perplexity
    assert found == pytest.approx(NAMED[name](model), rel=1e-4)


def test_llama_cpp_puts_bos_where_the_tokenizer_does(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tiny_models.byte_tokenizer()
    bos = starting.bos_token_id
    starting.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    told = Model("mine", model.loaded, starting)
    name = put(monkeypatch, protocols.llama_cpp(32))
    assert measured(told, data=text, protocol=name).perplexity == pytest.approx(by_llama_cpp(told, 32, bos), rel=1e-6)


def test_words_and_bytes_are_counted_of_the_documents(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(model, data=text, protocol=put(monkeypatch, protocols.word(32)))
    by_word, by_byte = by_words(model, 32)
    assert report.perplexity == pytest.approx(by_word, rel=1e-6)
    assert report.others["byte_perplexity"] == pytest.approx(by_byte, rel=1e-6)
    assert report.others["bits_per_byte"] == pytest.approx(math.log2(by_byte), rel=1e-6)
    assert report.sequences == 3  # documents with words


def test_every_named_protocol_scores_each_token_as_often_as_it_says() -> None:
    tokens = list(range(100))
    seen = torch.zeros(101)
    for sequence in protocols.sliding(tokens, 32, 8).sequences:
        seen[sequence.ids[sequence.first :]] += 1
    assert seen[1:100].tolist() == [1.0] * 99
    rolled = protocols.rolling([one + 1 for one in tokens], 0, 32, 0)
    seen = torch.zeros(101)
    for sequence in rolled:
        assert len(sequence.ids) <= 33
        seen[sequence.ids[sequence.first :]] += 1
    assert seen.tolist() == [0.0] + [1.0] * 100


def test_the_names_of_the_run_file_are_those_of_the_table() -> None:
    assert set(get_args(ProtocolName)) == set(protocols.PROTOCOLS)


# ------------------------------------------------------------------------------------------- divergence and passports


@pytest.fixture
def other(model: Model) -> Model:
    network = model.network(torch.float64)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.05)
    return Model("other", network, model.loaded_tokenizer)


def test_a_model_does_not_diverge_from_itself(model: Model, text: str) -> None:
    report = measured(model, model, data=text, sequence_length=48)
    assert report.divergence is not None
    assert (report.divergence.mean, report.divergence.maximum, report.divergence.agreement) == (0.0, 0.0, 1.0)
    assert (report.ratio, report.ratio_stderr) == (1.0, 0.0)


def test_the_divergence_is_that_of_whole_distributions(model: Model, other: Model, text: str) -> None:
    report = measured(other, model, data=text, sequence_length=48)
    tokens = tokens_of(model)
    found, agreed = [], []
    for start in range(0, len(tokens) - 47, 48):
        base, own = (logits_of(one, tokens[start : start + 48])[:-1].log_softmax(1) for one in (model, other))
        found.append((base.exp() * (base - own)).sum(1))
        agreed.append(base.argmax(1) == own.argmax(1))
    values, divergence = torch.cat(found), report.divergence
    assert divergence is not None
    assert divergence.mean == pytest.approx(float(values.mean()), rel=1e-6)
    assert divergence.stderr == pytest.approx(float(torch.stack(found).mean(1).std() / len(found) ** 0.5), rel=1e-6)
    assert divergence.maximum == pytest.approx(float(values.max()), rel=1e-6)
    assert divergence.median == pytest.approx(float(values.median()), rel=1e-6)
    assert divergence.percentile_99 == pytest.approx(float(values.quantile(0.99, interpolation="higher")), rel=1e-6)
    assert divergence.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))


def test_the_ratio_has_the_error_of_paired_windows(model: Model, other: Model, text: str) -> None:
    report = measured(other, model, data=text, sequence_length=48)
    alone = measured(model, data=text, sequence_length=48)
    losses = [torch.tensor(one.losses, dtype=torch.float64) for one in (report, alone)]
    differences = (losses[0] - losses[1]) / 47
    expected = math.exp(differences.mean())
    assert report.ratio == pytest.approx(expected)
    assert report.ratio_stderr == pytest.approx(expected * float(differences.std()) / len(differences) ** 0.5)
    assert report.base_model is not None and report.base_model.perplexity == pytest.approx(alone.perplexity)
    without = measured(other, model, data=text, sequence_length=48, divergence=False)
    assert without.divergence is None and without.ratio == pytest.approx(report.ratio, rel=1e-9)


def test_figures_share_a_column_only_with_equal_passports(model: Model, other: Model, text: str) -> None:
    column = measured(model, data=text, sequence_length=48).passport.column
    assert measured(other, data=text, sequence_length=48).passport.column == column
    changed: list[dict[str, Any]] = [
        {"sequence_length": 32},
        {"sequences": 3},
        {"dtype": "bfloat16"},
    ]
    for settings in changed:
        assert measured(model, **{"data": text, "sequence_length": 48, **settings}).passport.column != column
    Path(text).write_text(Path(text).read_text().replace("times", "TIMES"))
    assert measured(model, data=text, sequence_length=48).passport.column != column


def test_a_chat_and_a_short_text_are_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, short = tmp_path / "chat.jsonl", tmp_path / "short.txt"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    short.write_text("four")
    name = put(monkeypatch, protocols.word(32))
    with pytest.raises(DataError, match="a chat has no words"):
        measured(model, data=str(chat), protocol=name)
    with pytest.raises(DataError, match="fewer than one sequence of 32; choose another protocol"):
        measured(model, data=str(short), protocol=put(monkeypatch, protocols.llama_cpp(32)))
    with pytest.raises(ModelError, match="lower the length that --protocol names"):
        measured(model, data=str(short), protocol="gptq-2048")
    with pytest.raises(UsageError, match="there is no protocol 'gptq'; choose gptq-2048"):
        measured(model, data=str(short), protocol="gptq")
