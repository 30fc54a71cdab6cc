"""The tokenizer's own file against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_models
from transformers import PreTrainedTokenizerBase

from aqlm_cli.models import load_tokenizer, open_tokenizer, resolve
from aqlm_cli.models.source import ModelSource

TEXTS = [
    "The quick brown fox",
    " two  spaces ",
    "naïve café\n\t日本 🦊",
    "<bos> and <eos> inside",
    "",
    "don't , stop .",
]


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSource:
    return resolve(str(tiny_models.save("llama", tmp_path / "model")))


@pytest.fixture(params=["tiny", "smollm2-135m"])
def source(request: pytest.FixtureRequest) -> ModelSource:
    if request.param == "tiny":
        found: ModelSource = request.getfixturevalue("tiny")
        return found
    return resolve(request.param)


def change(source: ModelSource, **settings: object) -> None:
    path = source.directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_text_becomes_the_same_tokens_and_text_again(source: ModelSource) -> None:
    ours, theirs = open_tokenizer(source), load_tokenizer(source)
    assert not isinstance(ours, PreTrainedTokenizerBase)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for some in ids, [*range(20), *ids]:
            for skip in True, False:
                assert ours.decode(some, skip_special_tokens=skip) == theirs.decode(some, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "GPT2Tokenizer"},
        {"add_bos_token": True},
        {"pad_token": "<new>"},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_settings_that_the_file_lacks_are_left_to_transformers(tiny: ModelSource, settings: dict[str, object]) -> None:
    change(tiny, **settings)
    tokenizer = open_tokenizer(tiny)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert tokenizer.encode(TEXTS[0]) == load_tokenizer(tiny).encode(TEXTS[0])


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"tokenizer_class": "TokenizersBackend", "bos_token": {"content": "<bos>"}}']
)
def test_an_odd_file_is_left_to_transformers(tiny: ModelSource, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aqlm_cli.models.tokenizer.load_tokenizer", lambda source: "transformers' own")
    (tiny.directory / "tokenizer_config.json").write_text(content)
    assert open_tokenizer(tiny) == "transformers' own"
    (tiny.directory / "tokenizer_config.json").unlink()
    assert open_tokenizer(tiny) == "transformers' own"


def test_a_setting_that_is_off_changes_nothing(tiny: ModelSource) -> None:
    change(tiny, add_bos_token=False, pad_token=None)
    assert not isinstance(open_tokenizer(tiny), PreTrainedTokenizerBase)
