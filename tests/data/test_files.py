"""Documents of local files: every kind gives the same ones, and what is no text is refused by name."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from aqlm_cli.data.chats import Chat
from aqlm_cli.data.files import COMPRESSIONS, read_texts
from aqlm_cli.data.sources import documents
from aqlm_cli.errors import DataError
from aqlm_cli.events import Event, Noted

# U+2028 ends a line for str.splitlines, not for JSON.
TEXTS = ["first\u2028document", "", "second\n\ndocument"]

PACKED: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pyarrow.compress(content, "zstd", asbytes=True)),
}

KINDS = ["jsonl", "json", "list.json", "parquet", *(f"jsonl{packed}" for packed in PACKED), "list.json.gz"]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records, in the form that the name of the file asks for; what a record lacks is null in parquet."""
    if path.suffix == ".parquet":
        keys = dict.fromkeys(key for record in records for key in record)
        pyarrow.parquet.write_table(pyarrow.table({key: [one.get(key) for one in records] for key in keys}), path)
        return path
    if ".list" in path.name:
        content = json.dumps(records, indent=1, ensure_ascii=False).encode()
    else:
        content = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    path.write_bytes(PACKED[path.suffix](content) if path.suffix in PACKED else content)
    return path


# ---------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"texts.{kind}", [{"id": number, "text": text} for number, text in enumerate(TEXTS)])
    assert documents(str(path), "calibration") == documents(str(path), "evaluation") == TEXTS


@pytest.mark.parametrize("packed", ["", *PACKED])
def test_plain_text_is_one_document(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"notes.txt{packed}"
    path.write_bytes(PACKED[packed](b"one\n\ntwo") if packed else b"one\n\ntwo")
    assert documents(str(path), "calibration") == ["one\n\ntwo"]


def test_every_compression_is_tried_here() -> None:
    assert PACKED.keys() == COMPRESSIONS.keys()


@pytest.mark.parametrize("packed", PACKED)
def test_files_that_were_packed_in_pieces_are_read_to_their_end(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"notes.txt{packed}"
    path.write_bytes(PACKED[packed](b"one ") + PACKED[packed](b"two"))
    assert read_texts(path) == ["one two"]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"none of it"])
def test_a_compressed_file_that_is_damaged_is_refused(
    tmp_path: Path, packed: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(damage(PACKED[packed](b'{"text": "a"}' * 99)))
    with pytest.raises(DataError, match=rf"cannot read .*a\.jsonl\{packed} as \.jsonl\{packed}"):
        read_texts(path)


# --------------------------------------------------------------------------------------------------- null and missing

GAPS: Mapping[str, list[dict[str, Any]]] = {
    "null first and text later": [{"text": None}, {"text": None}, {"text": "a"}],
    "no key first and text later": [{"id": 1}, {"id": 2}, {"id": 3, "text": "a"}],
    "null and missing by turns": [{"id": 1, "text": None}, {"id": 2}, {"id": 3, "text": "a"}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gaps", GAPS)
def test_a_record_without_text_is_an_empty_document_in_every_kind_of_file(tmp_path: Path, kind: str, gaps: str) -> None:
    path, told = write(tmp_path / f"texts.{kind}", GAPS[gaps]), list[Event]()
    assert read_texts(path, told.append) == ["", "", "a"]
    assert told == [Noted(f"{path}: 2 of 3 records have no text: the key is null or missing")]


@pytest.mark.parametrize("first", [{"id": 0, "text": None}, {"id": 0}], ids=["null", "missing"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_text_that_comes_after_10_megabytes_of_records_without_is_read(
    tmp_path: Path, kind: str, first: dict[str, Any]
) -> None:
    """`datasets` fixes the type of a column by its first block of 10 MB, and fails on both."""
    filled = {**first, "other": "x" * 1_000_000}
    path = write(tmp_path / f"texts.{kind}", [*[filled] * 12, {"id": 1, "text": "a", "other": ""}])
    assert read_texts(path) == [""] * 12 + ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_which_no_record_has_the_key_is_refused_with_the_keys_there_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"texts.{kind}", [{"id": 1, "content": "a"}] * 2)
    with pytest.raises(DataError, match="`text`, `messages` or `conversations`, only: id, content; rename"):
        read_texts(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_texts_are_all_null_has_no_text(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"texts.{kind}", [{"text": None}] * 2)
    with pytest.raises(DataError, match="has no text; choose another source"):
        documents(str(path), "calibration")


# ------------------------------------------------------------------------------------------------------ what is no text

VALUES = [3, 2.5, True, {"a": "b"}, ["a", "b"], [1, 2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_that_is_not_text_is_refused_in_every_kind_of_file(tmp_path: Path, kind: str, value: Any) -> None:
    path = write(tmp_path / f"texts.{kind}", [{"text": value}] * 2)
    reason = "column `text` is of type" if kind == "parquet" else "record 1"
    with pytest.raises(DataError, match=reason) as error:
        documents(str(path), "calibration")
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pyarrow.binary(), b"text"),
        (pyarrow.large_binary(), b"text"),
        (pyarrow.date32(), datetime.date(2020, 1, 1)),
        (pyarrow.timestamp("us"), datetime.datetime(2020, 1, 1)),
        (pyarrow.decimal128(5, 2), 1),
        (pyarrow.float16(), 1.5),
        (pyarrow.list_(pyarrow.string()), ["text"]),
        (pyarrow.struct({"text": pyarrow.string()}), {"text": "text"}),
        (pyarrow.map_(pyarrow.string(), pyarrow.string()), [("text", "text")]),
        (pyarrow.dictionary(pyarrow.int32(), pyarrow.int64()), 7),
    ],
    ids=str,
)
def test_a_column_of_another_type_is_refused_by_that(tmp_path: Path, type_: pyarrow.DataType, value: Any) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([None, value], type_)}), path)
    shown = pyarrow.parquet.read_schema(path).field("text").type
    with pytest.raises(DataError) as error:
        read_texts(path)
    assert f"a.parquet: column `text` is of type {shown}; it must hold strings or lists of messages" in str(error.value)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([*TEXTS, None]),
        pyarrow.array([*TEXTS, None], pyarrow.large_string()),
        pyarrow.array([*TEXTS, None], pyarrow.string_view()),
        pyarrow.array([*TEXTS, None]).dictionary_encode(),
        pyarrow.array([*TEXTS, None], pyarrow.large_string()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type).partition("<")[0],
)
def test_strings_in_any_of_arrows_layouts_are_text(tmp_path: Path, column: pyarrow.Array) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == [*TEXTS, ""]


def test_a_directory_of_parquet_files_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    for number in range(2):
        write(tmp_path / f"a.parquet/{number}.parquet", [{"text": f"part {number}"}])
    assert read_texts(tmp_path / "a.parquet") == ["part 0", "part 1"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt.gz", b"\xff\xfe\xff", "cannot read .* as .txt.gz"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "neither one JSON record per line nor a JSON list"),
        ("a.jsonl", b'{"text": "a"}\n' * 500 + b"{bad", "in double quotes at character 2 \\(line 501 of 501\\)"),
        ("a.json", b'[{"text": "a"},\n{bad}]', "in double quotes at character 18; correct or"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8 at byte 3; save it as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n"a"', "record 2 is a string; write it as"),
        ("a.json", b'["a"]', "record 1 is a string; write it as"),
        ("a.jsonl", b'{"text": "\\ud83d half"}', "record 1 holds half a character"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "neither one JSON record"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "neither one JSON record"),
        ("a.jsonl", b'{"messages": "a"}', "`messages` is a string; it must be a list of messages"),
        ("a.parquet", b"not parquet", "column `text`"),
        ("a.parquet.gz", b"", r"must end in \.txt"),
        ("a.csv", b"text\na", r"must end in \.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        documents(str(tmp_path / name), "calibration")
    assert name in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- chats

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OLDER = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "messages"), [("messages", CHAT), ("text", CHAT), ("conversations", CHAT), ("conversations", OLDER)]
)
def test_lists_of_messages_are_chats_in_every_kind_of_file(
    tmp_path: Path, kind: str, key: str, messages: list[dict[str, str]]
) -> None:
    path, told = write(tmp_path / f"chat.{kind}", [{key: messages}, {key: None}, {key: []}]), list[Event]()
    assert read_texts(path, told.append) == [Chat(f"{path}: record 1", tuple(CHAT)), "", ""]
    assert told[-1] == Noted(f"{path}: 1 chats, formatted with the tokenizer's chat template")


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_keys_the_first_that_is_not_null_counts(tmp_path: Path, kind: str) -> None:
    path = write(
        tmp_path / f"both.{kind}",
        [{"text": "a", "messages": CHAT}, {"text": None, "messages": CHAT}, {"text": "b", "messages": None}],
    )
    assert read_texts(path) == ["a", Chat(f"{path}: record 2", tuple(CHAT)), "b"]


@pytest.mark.parametrize("layout", [pyarrow.list_, pyarrow.large_list, pyarrow.list_view, pyarrow.large_list_view])
def test_messages_in_any_of_arrows_lists_are_a_chat(tmp_path: Path, layout: Callable[..., pyarrow.DataType]) -> None:
    column = pyarrow.array([CHAT], layout(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string_view()})))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), path)
    assert read_texts(path) == [Chat(f"{path}: record 1", tuple(CHAT))]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_keys_of_a_message_stay_missing_in_any_kind_of_file(tmp_path: Path, kind: str) -> None:
    """In parquet every message, and every struct in it, has the keys of all."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"name": "g", "arguments": {"y": 2}}]}
    chat = [CHAT[0], call, {"role": "tool", "content": "1", "name": "f"}, other]
    path = write(tmp_path / f"chat.{kind}", [{"messages": chat}])
    kept = tuple({key: value for key, value in message.items() if value is not None} for message in chat)
    assert read_texts(path) == [Chat(f"{path}: record 1", kept)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_not_text(name: str, tmp_path: Path) -> None:
    content = {"a.txt": "one", "a.jsonl": '{"text": "one"}\n', "a.json": '[{"text": "one"}]'}[name]
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert read_texts(tmp_path / name) == ["one"]


def test_a_single_record_on_a_single_line_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 7}')
    assert read_texts(tmp_path / "a.jsonl") == ["one"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 2 columns `text`; rename all but one"):
        read_texts(tmp_path / "a.parquet")
