"""Documents from a local file: plain text, JSON lines or a JSON list, parquet.

Plain text is one document. Of the others each record is one, under the key or column `text`: the shape of the public
shards of C4, Wikipedia and WikiText, so that a downloaded shard can stand in for the hub.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from aqlm_cli.errors import DataError

FILE_KINDS = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def read_texts(path: Path) -> list[str]:
    """All documents in the order of the file, empty ones included; DataError if it cannot be read."""
    kind = next((kind for kind in FILE_KINDS if path.name.endswith(kind)), None)
    if kind is None:
        raise DataError(f"{path} is no file of text that can be read; its name must end in {', '.join(FILE_KINDS)}")
    if kind == ".parquet":
        return _from_parquet(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if kind.endswith(".gz") else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as {kind}: {error}") from error
    return [text] if kind == ".txt" else list(_from_json(path, text))


def _from_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as parquet with a column `text`: {error}") from error
    return [str(text or "") for text in column.to_pylist()]


def _from_json(path: Path, content: str) -> Iterator[str]:
    """One list of records, or one record a line; a line ends at a newline only, as texts hold U+2028 and the like."""
    try:
        whole = content.lstrip().startswith("[")
        records = json.loads(content) if whole else [json.loads(line) for line in content.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is neither one JSON record a line nor a JSON list: {error}") from error
    for number, record in enumerate(records, start=1):
        if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
            raise DataError(f"{path}: record {number} has no key `text` with a string")
        yield record["text"]
