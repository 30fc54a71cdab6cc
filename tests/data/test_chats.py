"""Chats against transformers' own `apply_chat_template`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aqlm_cli.data.chats import Chat, chat_ids, chat_of
from aqlm_cli.data.sequences import calibration_sequences, evaluation_sequences, opening_tokens
from aqlm_cli.errors import DataError
from aqlm_cli.models import load_tokenizer, resolve

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' + message['content'] }}<|im_end|>\\n"
    "{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\\n\\n{{ message.content | trim }}"
    "{{ eos_token }}{% endfor %}"
)
PARTS = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% elif message.content %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
)
PRINTS = "{% for message in messages %}{{ message.content }}{% endfor %}"

MESSAGES = [
    {"role": "system", "content": "Be <eos> brief."},
    {"role": "user", "content": " naïve 🦊\n"},
    {"role": "assistant", "content": "a"},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": None}}]}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Of bytes, that puts <bos> before a text, as Llama's do."""
    made = tiny_models.byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.convert_tokens_to_ids("<bos>"))]
    )
    made.chat_template = template
    return made


def ids(messages: list[dict[str, Any]], template: str | None) -> list[int]:
    return chat_ids(chat_of("a.jsonl: record 7", messages), tokenizer(template))


# ------------------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize(
    ("template", "messages"),
    [(CHATML, MESSAGES), (LLAMA, MESSAGES), (PARTS, [*MESSAGES, CALL, IN_PARTS]), (PRINTS, [*MESSAGES, CALL])],
)
def test_the_tokens_equal_those_of_transformers(template: str, messages: list[dict[str, Any]]) -> None:
    own = tokenizer(template)
    found = ids(messages, template)
    assert found == own.apply_chat_template(messages, tokenize=True, return_dict=False)
    rendered = own.apply_chat_template(messages, tokenize=False)
    assert found == own.encode(rendered, add_special_tokens=False)
    assert own.decode(found) == rendered
    assert found.count(own.bos_token_id) == rendered.count("<bos>")


def test_the_older_form_gives_the_same_tokens() -> None:
    older = [
        {"from": "system", "value": "Be <eos> brief."},
        {"from": "human", "value": " naïve 🦊\n"},
        {"from": "gpt", "value": "a"},
    ]
    assert ids(older, CHATML) == ids(MESSAGES, CHATML)


def test_null_keys_count_as_missing() -> None:
    template = "{% for message in messages %}{% if 'name' in message %}{{ message.name }}{% endif %}{% endfor %}a"
    assert ids([{**MESSAGES[0], "name": None}], template) == ids([MESSAGES[0]], template)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "message 2 is a string; write it as"),
        (None, "message 2 is null; write it as"),
        ({"content": "a"}, "message 2 has no string `role`; write it as"),
        ({"role": 3, "content": "a"}, "message 2 has no string `role`"),
        ({"role": "", "content": "a"}, "message 2 has no string `role`"),
        ({"role": "user"}, "message 2 has no `content`; give it a string"),
        ({"role": "user", "content": None}, "message 2 has no `content`; give it a string"),
        ({"role": "user", "content": 3}, "message 2 has a number as its `content`"),
        ({"role": "user", "content": {"a": "b"}}, "message 2 has a record as its `content`"),
        ({"role": "user", "content": ["a"]}, "message 2, part 1 is not text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "message 2, part 1 is not text"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "message 2, part 1 is not text"),
        ({"role": "user", "content": "\ud83d"}, "message 2 holds half a character"),
        ({"from": "bing", "value": "a"}, "message 2 is from 'bing'; only human"),
        ({"from": ["human"], "value": "a"}, "message 2 is from"),
        ({"from": "human", "value": None}, "message 2 has no `content`"),
    ],
    ids=str,
)
def test_a_message_that_no_template_can_read_is_named(message: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"^a.jsonl: record 7, {reason}"):
        chat_of("a.jsonl: record 7", [MESSAGES[0], message])


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            None,
            MESSAGES,
            "no chat template; add a chat_template.jinja to the model's directory, or give the chats as strings",
        ),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, "refuses these messages: roles must alternate"),
        ("{{ messages[9].content }}", MESSAGES, "refuses these messages"),
        ("{% for", MESSAGES, "refuses these messages"),
        (PRINTS, [MESSAGES[0], IN_PARTS], "does not read content in parts; join the parts to one string"),
        ("{{ messages }}", [IN_PARTS], "does not read content in parts"),
        ("{% for part in messages[0].content %}{{ part }}{% endfor %}", [IN_PARTS], "does not read content in parts"),
        (CHATML, [IN_PARTS], "refuses these messages"),
    ],
)
def test_messages_that_the_template_refuses_are_one_line_with_the_record(
    template: str | None, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as error:
        ids(messages, template)
    assert str(error.value).startswith("a.jsonl: record 7") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ sequences


def chats(path: Path, count: int = 30) -> tuple[str, list[list[dict[str, str]]]]:
    """A file of chats, and their messages."""
    records = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(count)]
    path.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    return str(path), records


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_evaluation_sequences_are_the_chats_in_order(tmp_path: Path, template: str, opened: bool) -> None:
    name, records = chats(tmp_path / "chat.jsonl")
    own = tokenizer(template)
    opening = opening_tokens(own, None) if opened else ()
    found = evaluation_sequences(name, 16, own, opening=opening)
    text = [id for one in records for id in own.apply_chat_template(one, tokenize=True, return_dict=False)]
    expected = []
    while True:
        start = [own.bos_token_id] if opened and text[0] != own.bos_token_id else []
        window, text = [*start, *text[: 16 - len(start)]], text[16 - len(start) :]
        if len(window) < 16 or not text:
            break
        expected.append(window)
    assert found.tolist() == expected
    doubled = (found[:, 1:] == own.bos_token_id) & (found[:, :-1] == own.bos_token_id)
    assert not doubled.any()


@pytest.mark.parametrize(("template", "between"), [(LLAMA, ""), (CHATML, "<eos>")])
def test_end_of_text_stands_between_chats_where_the_template_writes_none(
    tmp_path: Path, template: str, between: str
) -> None:
    name, records = chats(tmp_path / "chat.jsonl")
    own = tokenizer(template)
    found = calibration_sequences(name, 10, 40, 0, own).ids
    rendered = [own.apply_chat_template(one, tokenize=False) for one in records]
    random.Random("0/documents").shuffle(rendered)
    assert found.flatten().tolist() == own.encode(between.join(rendered), add_special_tokens=False)[:400]


def test_a_template_that_begins_as_the_documents_are_joined_begins_once(tmp_path: Path) -> None:
    name, _ = chats(tmp_path / "chat.jsonl")
    own = tokenizer("{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}")
    own.eos_token = None
    found = own.decode(calibration_sequences(name, 1, 60, 0, own, opening=opening_tokens(own, True)).ids[0])
    assert found.startswith("<bos>q") and "<bos><bos>" not in found and found.count("<bos>") > 5


# ------------------------------------------------------------------------------------------------------------- commands


def test_calibrate_finetune_and_eval_ppl_note_which_file_uses_the_template(run_file: Path) -> None:
    _, records = chats(Path("chat.jsonl"), 200)
    name = "chat.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": records}), name)
    said = f"{name}: 200 chats, formatted with the tokenizer's chat template"
    made = run("quantize", "--config", "run.yaml", "--data", f"{name}:8", "--out", "run")
    assert made.exit_code == 0 and said in made.output
    own: Any = load_tokenizer(resolve("tiny"))
    expected = calibration_sequences(f"{name}:8", None, 32, 0, own).ids
    assert torch.equal(load_file("run/calibration/windows.safetensors")["ids"].long(), expected)
    assert "q" in own.decode(expected[0]) and "role" not in own.decode(expected.flatten())
    measured = run("eval-ppl", "run", "--data", name, "--sequence-length", "16")
    assert measured.exit_code == 0 and said in measured.output
    tuned = run("finetune", "run", "--data", f"{name}:24", "--sequence-length", "8", "--steps", "1")
    assert tuned.exit_code == 0 and said in tuned.output


def test_a_model_without_a_chat_template_is_one_line_that_says_what_to_do(run_file: Path) -> None:
    name, _ = chats(Path("chat.jsonl"))
    Path("tiny/chat_template.jinja").unlink()
    line = refused("calibrate", "--config", "run.yaml", "--data", f"{name}:4", "--out", "run")
    assert "chat.jsonl: record " in line and "the model's tokenizer has no chat template; add a" in line
    assert "no chat template" in refused("eval-ppl", "tiny", "--data", name, "--sequence-length", "64")


def test_a_chat_is_what_was_read(tmp_path: Path) -> None:
    assert chat_of("here", MESSAGES) == Chat("here", tuple(MESSAGES))
