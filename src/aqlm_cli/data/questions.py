"""Questions with choices, one a line of a file of JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.data.chats import kind_of, refuse_half_characters
from aqlm_cli.data.files import COMPRESSIONS, decoded
from aqlm_cli.errors import DataError, shortened
from aqlm_cli.formatting import counted

FORM = '{"question": "...", "choices": ["...", "..."], "answer": 0}'
"""A line of such a file. Other keys are left alone."""


@dataclass(frozen=True)
class Question:
    """A question, which may be empty, its choices, and the index of the right one; `place` is its file and line."""

    text: str
    choices: tuple[str, ...]
    answer: int
    place: str


def read_questions(path: Path) -> list[Question]:
    """The questions of the file, in its order. DataError names the first line that holds none."""
    # Only a newline ends a line: texts hold U+2028.
    lines = decoded(path, ".jsonl", COMPRESSIONS.get(path.suffix)).split("\n")
    questions = [_question(f"{path}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"{path} has no questions; write one a line: {FORM}")
    return questions


def _question(place: str, line: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place} is not JSON: {reason}; write it as {FORM}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is {kind_of(record)}; write it as {FORM}")
    for key in ("question", "choices", "answer"):
        if key not in record:
            raise DataError(f"{place} has no `{key}`; write it as {FORM}")
    text, choices = record["question"], _choices(place, record["choices"])
    if not isinstance(text, str):
        raise DataError(f"{place}: `question` is {kind_of(text)}; it must be a string")
    if text and not text.strip():
        raise DataError(f"{place}: `question` is white space alone; write one, or leave it empty")
    refuse_half_characters(place, "".join((text, *choices)))
    return Question(text, choices, _answer(place, record["answer"], choices), place)


def _choices(place: str, choices: Any) -> tuple[str, ...]:
    if not isinstance(choices, list):
        raise DataError(f"{place}: `choices` is {kind_of(choices)}; it must be a list of strings")
    if len(choices) < 2:
        raise DataError(f"{place} has {counted(len(choices), 'choice')}; give at least two")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise DataError(f"{place}: choice {number} is {kind_of(choice)}; it must be a string")
        if not choice.strip():
            raise DataError(f"{place}: choice {number} is empty; write it, or remove it")
        alike = [other for other in range(number) if choices[other].strip() == choice.strip()]
        if alike:
            raise DataError(f"{place}: choices {alike[0]} and {number} are the same; remove one of them")
    return tuple(choices)


def _answer(place: str, answer: Any, choices: tuple[str, ...]) -> int:
    """The index that an index or a text means."""
    if isinstance(answer, str):
        if answer not in choices:
            reason = "is the text of no choice; copy the right one, or write its index, from 0"
            raise DataError(f"{place}: `answer` {shortened(repr(answer))} {reason}")
        return choices.index(answer)
    if type(answer) is not int:  # True is an int for isinstance
        raise DataError(f"{place}: `answer` is {kind_of(answer)}; it must be an index, from 0, or the text of a choice")
    if not 0 <= answer < len(choices):
        raise DataError(f"{place}: `answer` {answer} is out of range; the choices have indices 0 to {len(choices) - 1}")
    return answer
