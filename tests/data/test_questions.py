"""Files of questions with choices: the form of a line, and one clear line of refusal for every other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from aqlm_cli.data.questions import Question, read_questions
from aqlm_cli.errors import DataError

GOOD = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


def test_the_answer_is_an_index_or_the_text_of_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f'{GOOD}\n\n{{"question": "", "choices": ["a", "b"], "answer": "b", "id": 7}}\n')
    assert read_questions(path) == [
        Question("2 + 2 =", ("3", "4"), 1, f"{path}: line 1"),
        Question("", ("a", "b"), 1, f"{path}: line 3"),
    ]


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode()))
    assert [question.text for question in read_questions(path)] == ["2 + 2 ="]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": None}, "`question` is null; it must be a string"),
        ({"question": 3}, "`question` is a number; it must be a string"),
        ({"question": "  "}, "`question` is white space alone; write one, or leave it empty"),
        ({"question": "\ud83d"}, "holds half a character"),
        ({"choices": "3, 4"}, "`choices` is a string; it must be a list of strings"),
        ({"choices": []}, "has 0 choices; give at least two"),
        ({"choices": ["3"]}, "has 1 choice; give at least two"),
        ({"choices": ["3", 4]}, "choice 1 is a number; it must be a string"),
        ({"choices": ["3", ""]}, "choice 1 is empty; write it, or remove it"),
        ({"choices": ["3", "4", "3"]}, "choices 0 and 2 are the same; remove one of them"),
        ({"answer": 2}, "`answer` 2 is out of range; the choices have indices 0 to 1"),
        ({"answer": -1}, "`answer` -1 is out of range"),
        ({"answer": True}, "`answer` is true or false; it must be an index, from 0, or the text of a choice"),
        ({"answer": 1.0}, "`answer` is a number; it must be an index"),
        ({"answer": None}, "`answer` is null"),
        ({"answer": "5"}, "`answer` '5' is the text of no choice; copy the right one, or write its index, from 0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n{json.dumps({**json.loads(GOOD), **changes})}\n")
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert f"{path}: line 2" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("key", ["question", "choices", "answer"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({name: value for name, value in json.loads(GOOD).items() if name != key}))
    with pytest.raises(DataError, match=rf'line 1 has no `{key}`; write it as {{"question"'):
        read_questions(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"has no questions; write one a line: \{"),
        (b"\n \n", "has no questions"),
        (b"{\n", "line 1 is not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b"[1]\n", "line 1 is a list; write it as"),
        (b'{"question": "\xff"}', "is not UTF-8 at byte 14"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_another_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_questions(path)
