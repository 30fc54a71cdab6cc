"""Chats: lists of messages, and the tokens that a tokenizer's own chat template makes of them.

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
"""Roles by the names that `from` gives them."""

INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content")
"""Keys of which a message without content must have one."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that a chat needs."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, return_dict: bool) -> Any: ...


@dataclass(frozen=True)
class Chat:
    """The messages of one document, checked; `place` says where it stands, for what the template may refuse in them."""

    place: str
    messages: tuple[Mapping[str, Any], ...]


def chat_ids(chat: Chat, tokenizer: ChatTokenizer) -> list[int]:
    """The token ids that `apply_chat_template` gives: special tokens are those of the template, and no others."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{chat.place} is a chat, and the model's tokenizer has no chat template; put a chat_template.jinja beside "
            "the model, or give the chats as strings under `text`"
        )
    messages = [dict(message) for message in chat.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        parts = [part for message in messages for part in message.get("content", ()) if isinstance(part, dict)]
        written = tokenizer.apply_chat_template(messages, tokenize=False, return_dict=False) if parts else ""
    except Exception as error:  # a template raises errors of Jinja's, of its own, and any that Python has
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 200)
        raise DataError(f"{chat.place}: the tokenizer's chat template refuses these messages: {reason}") from error
    if any(str(part) in written for part in parts):
        raise DataError(
            f"{chat.place}: the tokenizer's chat template does not read content in parts; join the parts to one string"
        )
    return list(ids)


# ------------------------------------------------------------------------------------------------------------- reading


def chat_of(place: str, messages: Sequence[Any]) -> Chat:
    """DataError, with `place` and the number of the message, for the first one that no template could read."""
    return Chat(place, tuple(_message(f"{place}, message {number}", one) for number, one in enumerate(messages, 1)))


def _message(place: str, message: Any) -> dict[str, Any]:
    """Without keys that are null, which are as good as missing: in parquet every message has the keys of all.

    transformers leaves them out, too, since many templates would write None.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is {kind_of(message)}; write it as {FORM}")
    said = {key: value for key, value in message.items() if value is not None}
    if "role" not in said and "from" in said:
        said = _in_todays_form(place, said)
    role = said.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place} has no `role` that is a string; write it as {FORM}")
    content = said.get("content")
    if content is None:
        if not any(said.get(key) for key in INSTEAD_OF_CONTENT):
            raise DataError(f"{place} has no `content`; give it a string, or leave the message out")
    elif isinstance(content, list):
        said["content"] = [_part(f"{place}, part {number}", part) for number, part in enumerate(content, 1)]
    elif isinstance(content, str):
        refuse_half_characters(place, content)
    else:
        raise DataError(f"{place} has {kind_of(content)} as its `content`; write it as {FORM}")
    return said


def _in_todays_form(place: str, message: Mapping[str, Any]) -> dict[str, Any]:
    name = message["from"]
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"{place} is from {shortened(repr(name))}; only {', '.join(ROLES)} are known, rename it")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    value = {"content": message["value"]} if "value" in message else {}
    return {"role": ROLES[name], **value, **rest}


def _part(place: str, part: Any) -> dict[str, Any]:
    said = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if said.get("type") != "text" or not isinstance(said.get("text"), str):
        raise DataError(f'{place} is no text; only parts such as {{"type": "text", "text": "..."}} are read')
    refuse_half_characters(place, said["text"])
    return said


def kind_of(value: Any) -> str:
    """Of a value in a file, in the words of JSON."""
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
    r"""JSON may hold one half of a surrogate pair, such as "\ud83d", which is no character to any tokenizer."""
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{place} holds half a character, written as \\ud800 to \\udfff; remove or mend it")
