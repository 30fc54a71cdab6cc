"""Chats: lists of messages, formatted and tokenized with the tokenizer's chat template.

A message is {"role": "user", "content": "..."}, or {"from": "human", "value": "..."} in the older form. All other keys,
such as `tool_calls`, pass through to the template as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aqlm_cli.errors import DataError, shortened

FORM = '{"role": "user", "content": "..."}'

ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Roles by their names under `from`."""

INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content")
"""Keys, one of which a message without content must have."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that a chat needs."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, return_dict: bool) -> Any: ...


@dataclass(frozen=True)
class Chat:
    """The checked messages of one document; `place` is its position in a file, for error messages."""

    place: str
    messages: tuple[Mapping[str, Any], ...]


def chat_ids(chat: Chat, tokenizer: ChatTokenizer) -> list[int]:
    """The token ids of `apply_chat_template`: the template alone adds special tokens."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{chat.place} is a chat, but the model's tokenizer has no chat template; add a chat_template.jinja to "
            "the model's directory, or give the chats as strings under `text`"
        )
    messages = [dict(message) for message in chat.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        parts = [part for message in messages for part in message.get("content", ()) if isinstance(part, dict)]
        written = tokenizer.apply_chat_template(messages, tokenize=False, return_dict=False) if parts else ""
    except Exception as error:  # a template raises Jinja's errors, its own, and any of Python's
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 200)
        raise DataError(f"{chat.place}: the tokenizer's chat template refuses these messages: {reason}") from error
    if any(str(part) in written for part in parts):
        raise DataError(
            f"{chat.place}: the tokenizer's chat template does not read content in parts; join the parts to one string"
        )
    return list(ids)


# ------------------------------------------------------------------------------------------------------------- reading


def chat_of(place: str, messages: Sequence[Any]) -> Chat:
    """A chat of valid messages; DataError, with `place` and the number of the message, for the first invalid one."""
    return Chat(place, tuple(_message(f"{place}, message {n}", message) for n, message in enumerate(messages, 1)))


def _message(place: str, message: Any) -> dict[str, Any]:
    """The message without null keys, which count as missing: in parquet every message has the keys of all.

    transformers drops them, too, since many templates would write None.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is {kind_of(message)}; write it as {FORM}")
    kept = {key: value for key, value in message.items() if value is not None}
    if "role" not in kept and "from" in kept:
        kept = _converted(place, kept)
    role = kept.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place} has no string `role`; write it as {FORM}")
    content = kept.get("content")
    if content is None:
        if not any(kept.get(key) for key in INSTEAD_OF_CONTENT):
            raise DataError(f"{place} has no `content`; give it a string, or leave the message out")
    elif isinstance(content, list):
        kept["content"] = [_part(f"{place}, part {number}", part) for number, part in enumerate(content, 1)]
    elif isinstance(content, str):
        refuse_half_characters(place, content)
    else:
        raise DataError(f"{place} has {kind_of(content)} as its `content`; write it as {FORM}")
    return kept


def _converted(place: str, message: Mapping[str, Any]) -> dict[str, Any]:
    name = message["from"]
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"{place} is from {shortened(repr(name))}; only {', '.join(ROLES)} are supported: rename it")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    value = {"content": message["value"]} if "value" in message else {}
    return {"role": ROLES[name], **value, **rest}


def _part(place: str, part: Any) -> dict[str, Any]:
    kept = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if kept.get("type") != "text" or not isinstance(kept.get("text"), str):
        raise DataError(f'{place} is not text; only parts such as {{"type": "text", "text": "..."}} are supported')
    refuse_half_characters(place, kept["text"])
    return kept


def kind_of(value: Any) -> str:
    """Type of a value in a file, in the words of JSON."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a record",
    }
    return "null" if value is None else kinds.get(type(value), f"of type {type(value).__name__}")


def refuse_half_characters(place: str, text: str) -> None:
    r"""Raise DataError for half a surrogate pair, such as "\ud83d": valid JSON, but not a character for a tokenizer."""
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{place} holds half a character, written as \\ud800 to \\udfff; remove or fix it")
