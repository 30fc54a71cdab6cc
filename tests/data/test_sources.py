from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aqlm_cli.data import sequences, sources
from aqlm_cli.data.sequences import calibration_sequences, evaluation_sequences
from aqlm_cli.data.sources import documents
from aqlm_cli.data.spec import Source, parse_sources
from aqlm_cli.errors import DataError
from aqlm_cli.events import Event, Noted

BOS, EOS, FIRST_LETTER = 0, 1, 2


class Letters:
    """One token a character; a begin-of-text token where a tokenizer would put one by default."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + [FIRST_LETTER + ord(letter) for letter in text]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, return_dict: bool) -> list[int]:
        raise NotImplementedError


class WithoutEnd(Letters):
    eos_token_id = None


class WithoutMarks(WithoutEnd):
    bos_token_id = None


def spell(tokens: Tensor) -> str:
    return "".join({BOS: "<", EOS: "|"}.get(token) or chr(token - FIRST_LETTER) for token in tokens.flatten().tolist())


def json_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


DOCUMENTS = [letter * 7 for letter in "abcdefghijklmnopqrstuvwxyz"]

# -------------------------------------------------------------------------------------------------------- calibration


def test_a_count_follows_the_last_colon() -> None:
    assert parse_sources("c4:96, notes.txt:32") == (Source("c4", 96), Source("notes.txt", 32))
    assert parse_sources(r"C:\notes.txt,a:b:3") == (Source(r"C:\notes.txt", None), Source("a:b", 3))


@pytest.mark.parametrize("spec", ["", "c4,", "c4:0", ":5"])
def test_a_source_without_name_or_sequences_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="SOURCE:SEQUENCES"):
        parse_sources(spec)


def test_calibration_joins_shuffled_documents_by_end_of_text_and_cuts_without_a_gap(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "letters.jsonl", DOCUMENTS)
    cut = calibration_sequences(path, 20, 10, 0, Letters())
    assert cut.ids.shape == (20, 10) and cut.ids.dtype == torch.int64
    found = spell(cut.ids).removesuffix("|").split("|")
    assert len(set(found)) == 25 and set(found) <= set(DOCUMENTS), "every document whole, and once"
    assert found != sorted(found), "in the order of the file: not shuffled"


def test_the_seed_alone_decides_the_order(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "letters.jsonl", DOCUMENTS)

    def drawn(seed: int) -> Tensor:
        return calibration_sequences(path, 4, 10, seed, Letters()).ids

    random.seed(1)
    first = drawn(0)
    random.seed(2)
    assert torch.equal(first, drawn(0))
    assert not torch.equal(first, drawn(1))


def test_each_source_gives_its_sequences_in_the_order_of_the_spec(tmp_path: Path) -> None:
    small = json_lines(tmp_path / "small.jsonl", ["a" * 50])
    large = json_lines(tmp_path / "large.jsonl", ["b" * 50])
    cut = calibration_sequences(f"{large}:2,{small}:1", None, 10, 0, Letters())
    assert spell(cut.ids) == "b" * 20 + "a" * 10
    assert cut.sources == (large, large, small)


@pytest.mark.parametrize(
    ("counts", "sequences", "shared"),
    [([":2", ":3"], None, [2, 3]), ([":2", ":3"], 5, [2, 3]), (["", ""], 5, [3, 2]), ([":4", "", ""], 7, [4, 2, 1])],
)
def test_sources_without_a_count_share_what_is_left(
    tmp_path: Path, counts: list[str], sequences: int | None, shared: list[int]
) -> None:
    names = [json_lines(tmp_path / f"{number}.jsonl", ["a" * 50]) for number in range(len(counts))]
    spec = ",".join(name + count for name, count in zip(names, counts, strict=True))
    sources = calibration_sequences(spec, sequences, 10, 0, Letters()).sources
    assert [sources.count(name) for name in names] == shared


@pytest.mark.parametrize(
    ("spec", "sequences", "reason"),
    [
        ("c4:2,builtin:3", 6, "5 sequences, but --sequences is 6"),
        ("c4:2,builtin", None, "only some"),
        ("c4:2,builtin", 2, "too few"),
    ],
)
def test_counts_that_do_not_fit_the_total_are_refused_before_any_text_is_read(
    spec: str, sequences: int | None, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        calibration_sequences(spec, sequences, 10, 0, Letters())


def test_too_few_tokens_are_an_error_with_the_number_of_sequences(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "letters.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match="has 20 sequences of 10 tokens, 96 are needed; lower --sequences"):
        calibration_sequences(path, 96, 10, 0, Letters())


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_text_without_a_token_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    path = json_lines(tmp_path / "empty.jsonl", texts)
    with pytest.raises(DataError, match="has no text"):
        calibration_sequences(path, 1, 10, 0, Letters())
    with pytest.raises(DataError, match="has no text"):
        evaluation_sequences(path, 10, Letters())


def test_text_shorter_than_one_evaluation_sequence_is_an_error(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "short.jsonl", ["abc"])
    with pytest.raises(DataError, match="has 4 tokens, fewer than one sequence of 10"):
        evaluation_sequences(path, 10, Letters())


@pytest.mark.parametrize(
    ("tokenizer", "between", "told"), [(WithoutEnd(), "<", "its BOS token"), (WithoutMarks(), "", "nothing")]
)
def test_without_an_end_of_text_token_documents_are_joined_by_bos_or_nothing(
    tmp_path: Path, tokenizer: Letters, between: str, told: str
) -> None:
    path, events = json_lines(tmp_path / "letters.jsonl", ["aaa", "aaa", "aaa"]), list[Event]()
    found = calibration_sequences(path, 1, 9, 0, tokenizer, emit=events.append)
    assert spell(found.ids) == between.join(["aaa"] * 3)[:9]
    assert events == [Noted(f"the model's tokenizer has no end-of-text token; {told} separates documents")]


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_joins_documents_by_two_newlines_tokenizes_once_and_drops_the_rest(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "letters.jsonl", ["aaaa", "", "bb"])
    assert spell(evaluation_sequences(path, 5, Letters())) == "<aaaa\n\n\n\nb"  # the last b is left over


def test_c4_is_drawn_exactly_as_in_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = random.Random(3)
    texts = ["".join(letters.choices("abcdefgh", k=letters.randrange(1, 40))) for _ in range(50)]
    monkeypatch.setattr(sequences, "documents", lambda name, split, emit: texts)
    found = evaluation_sequences("c4", 20, Letters())
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            tokens = Letters().encode(texts[random.randint(0, len(texts) - 1)], add_special_tokens=True)
            if len(tokens) > 20:
                break
        start = random.randint(0, len(tokens) - 20 - 1)
        expected.append(tokens[start : start + 20])
    assert found.tolist() == expected


def test_c4_without_a_document_longer_than_a_sequence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "documents", lambda name, split, emit: ["short", "shorter"])
    with pytest.raises(DataError, match="longer than 20 tokens"):
        evaluation_sequences("c4", 20, Letters())


def test_the_last_fifth_of_builtin_text_is_for_evaluation() -> None:
    calibration, evaluation = documents("builtin", "calibration"), documents("builtin", "evaluation")
    assert not set(calibration) & set(evaluation)
    sizes = [sum(map(len, texts)) for texts in (calibration, evaluation)]
    assert sum(sizes) > 300_000
    assert 0.1 < sizes[1] / sum(sizes) <= 0.2


def test_an_unknown_source_names_those_there_are() -> None:
    with pytest.raises(DataError, match="wikitext2, c4, redpajama, builtin, or a file"):
        documents("wikitext3", "evaluation")


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.mark.parametrize("name", sorted(sources.HUB))
def test_no_connection_is_one_line_at_once_that_names_what_needs_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} seconds to try again"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for data"))
    with pytest.raises(DataError, match="`builtin` or a local file") as error:
        documents(name, "calibration")
    assert "\n" not in str(error.value)


def test_a_hub_data_set_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fails(**arguments: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("it is\ngone")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.setattr(sources, "_answers", lambda url: True)
    with pytest.raises(DataError, match="wikitext2 could not be read: it is gone"):
        documents("wikitext2", "evaluation")


def test_redpajama_has_nothing_to_evaluate_on() -> None:
    with pytest.raises(DataError, match="no evaluation split"):
        documents("redpajama", "evaluation")


def test_a_stream_is_read_up_to_the_limit_in_the_shares_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read: list[str] = []

    def endless(data_files: str, **arguments: Any) -> Any:
        while True:
            read.append(data_files)
            yield {"text": "a" * 30, "meta": {}}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    monkeypatch.setattr(sources, "_answers", lambda url: True)
    texts = documents("redpajama", "calibration", characters=10_000)
    parts: Mapping[str, int] = {url: read.count(url) * 30 for url in read}
    assert sum(map(len, texts)) == pytest.approx(10_000, abs=11)
    for files in sources.HUB["redpajama"]["calibration"]:
        assert parts[files.arguments["data_files"]] == pytest.approx(files.share * 10_000, abs=30)


def test_the_shares_of_redpajama_are_a_whole() -> None:
    assert sum(files.share for files in sources.HUB["redpajama"]["calibration"]) == pytest.approx(1)


def test_other_code_reads_the_cache_alone_where_the_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def offline() -> tuple[bool, bool]:
        return datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE

    before = offline()
    monkeypatch.setattr(sources, "_answers", lambda _: False)
    with sources.reading_hub("arc_easy"):
        assert offline() == (True, True)
    assert offline() == before
    with (
        pytest.raises(
            DataError, match="arc_easy could not be read: gone; it is not in the cache, and the hub does not"
        ),
        sources.reading_hub("arc_easy"),
    ):
        raise ConnectionError("gone")
    assert offline() == before
