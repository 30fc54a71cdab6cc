"""Documents from a local file: plain text, JSON lines or a JSON list, parquet; all but the last also compressed.

Plain text is one document. In the other formats each record is one: a string under the key or column `text`, as in the
public shards of C4, Wikipedia and WikiText, or a list of messages under any of `KEYS`. The first of them that is not
null counts. A record in which all are null or missing, which parquet cannot distinguish, is an empty document. Other
types of values are refused, never converted.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from aqlm_cli.data.chats import Chat, chat_of, kind_of, refuse_half_characters
from aqlm_cli.errors import DataError, shortened
from aqlm_cli.events import Emit, Noted, silent

if TYPE_CHECKING:
    import pyarrow

Document: TypeAlias = str | Chat

KEYS = ("text", "messages", "conversations")


def _from_zstandard(content: bytes) -> bytes:
    import pyarrow  # Python itself reads it from 3.14 on

    with pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd") as stream:
        return bytes(stream.read())


COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _from_zstandard,
}

FILE_KINDS = f".txt, .json, .jsonl, each also with {', '.join(COMPRESSIONS)}, or .parquet"


def read_texts(path: Path, emit: Emit = silent) -> list[Document]:
    """All documents in the order of the file, empty ones included; DataError if it cannot be read.

    Emits a note for chats, and for records without text.
    """
    unpack = COMPRESSIONS.get(path.suffix)
    kind = path.suffix if unpack is None else Path(path.stem).suffix
    if kind == ".parquet" and unpack is None:
        documents = _from_parquet(path)
    elif kind in (".txt", ".json", ".jsonl"):
        text = decoded(path, kind, unpack)
        documents = [text] if kind == ".txt" else _from_json(path, text)
    else:
        raise DataError(f"{path} is not a supported text file; its name must end in {FILE_KINDS}")
    missing, chats = documents.count(None), sum(isinstance(document, Chat) for document in documents)
    if missing:
        emit(Noted(f"{path}: {missing} of {len(documents)} records have no text: the key is null or missing"))
    if chats:
        emit(Noted(f"{path}: {chats} chats, formatted with the tokenizer's chat template"))
    return ["" if document is None else document for document in documents]


def decoded(path: Path, kind: str, unpack: Callable[[bytes], bytes] | None) -> str:
    """The text of a file in UTF-8, after `unpack`; DataError where it cannot be read as `kind`."""
    try:
        content = path.read_bytes()
        # Some tools on Windows start a file with a byte order mark.
        return (content if unpack is None else unpack(content)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        form = kind if unpack is None else kind + path.suffix
        raise DataError(f"cannot read {path} as {form}: {error}") from error


def _from_json(path: Path, content: str) -> list[Document | None]:
    """One list of records, or one record per line; only a newline ends a line, because texts hold U+2028."""
    records: list[Any] = []
    whole = content.lstrip().startswith("[")
    lines = [content] if whole else content.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records += json.loads(line) if whole else [json.loads(line)]
        except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
            raise DataError(_no_json(path, number, len(lines), error)) from error
    documents = [_from_record(f"{path}: record {number}", record) for number, record in enumerate(records, 1)]
    if records and not any(key in record for record in records for key in KEYS):
        raise DataError(f"{path}: no record has {_no_key('key', records[0])}")
    return documents


def _no_json(path: Path, number: int, lines: int, error: Exception) -> str:
    place = f" (line {number} of {lines})" if lines > 1 else ""
    column = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"{path} is neither one JSON record per line nor a JSON list: {reason}{column}{place}; correct or remove it"


def _from_record(place: str, record: Any) -> Document | None:
    if not isinstance(record, dict):
        raise DataError(f'{place} is {kind_of(record)}; write it as {{"text": "..."}}')
    return next((_document(place, key, record[key]) for key in KEYS if record.get(key) is not None), None)


def _document(place: str, key: str, value: Any) -> Document:
    """The document of a value that is not null; a chat without messages is an empty document."""
    if key == "text" and isinstance(value, str):
        refuse_half_characters(place, value)
        return value
    if isinstance(value, list):
        return chat_of(place, value) if value else ""
    wanted = "a string or a list of messages" if key == "text" else "a list of messages"
    raise DataError(f"{place}: `{key}` is {kind_of(value)}; it must be {wanted}, convert it")


def _no_key(kind: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    existing = shortened(", ".join(names), 300) or "none"
    return f"a {kind} `text`, `messages` or `conversations`, only: {existing}; rename the one that holds the text"


# ------------------------------------------------------------------------------------------------------------- parquet


def _from_parquet(path: Path) -> list[Document | None]:
    import pyarrow
    import pyarrow.parquet

    documents: list[Document | None] = []
    try:
        file = pyarrow.parquet.ParquetDataset(path)
        columns = [key for key in KEYS if key in file.schema.names]
        if not columns:
            raise DataError(f"{path} does not have {_no_key('column', file.schema.names)}")
        for key in columns:
            if file.schema.names.count(key) > 1:
                raise DataError(f"{path} has {file.schema.names.count(key)} columns `{key}`; rename all but one")
            _refuse_column(path, file.schema.field(key))
            values = file.read(columns=[key])[key].to_pylist()
            documents = documents or [None] * len(values)
            for index, value in enumerate(values):
                if documents[index] is None and value is not None:
                    documents[index] = _document(f"{path}: record {index + 1}", key, _without_nulls(value))
            if None not in documents:
                break
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as parquet with a column `text`: {error}") from error
    return documents


def _refuse_column(path: Path, field: pyarrow.Field) -> None:
    """Raise DataError for a column that holds neither strings nor lists of records, in any of arrow's layouts."""
    from pyarrow import types

    kind = field.type
    if types.is_null(kind):
        return
    value = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    if field.name == "text" and any(is_string(value) for is_string in strings):
        return
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(is_list(kind) for is_list in lists) and (types.is_struct(kind.value_type) or types.is_null(kind.value_type)):
        return
    wanted = "strings or lists of messages" if field.name == "text" else "lists of messages"
    raise DataError(f"{path}: column `{field.name}` is of type {kind}; it must hold {wanted}, convert it")


def _without_nulls(value: Any) -> Any:
    """Structs without null keys: in parquet every struct of a column has the keys of all of them."""
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value
