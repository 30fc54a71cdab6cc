#!/usr/bin/env bash
# datasets 5.2.0: of a file of JSON lines, the first block of 10 MB decides which keys and types the lines have. A key
# that is null there and text later ends in DatasetGenerationError (streamed: TypeError), a key that first comes later
# in DatasetGenerationError from a CastError (streamed: CastError). One would expect what a small file of the same
# lines gives: all of the rows, with null where nothing was.
#
# Here: local files are read by ourselves, line by line.
#
# It printed:
#   null-2MB.jsonl, loaded: 4 rows, source is string
#   missing-2MB.jsonl, loaded: 4 rows, source is string
#   null-20MB.jsonl, loaded: DatasetGenerationError from TypeError
#   null-20MB.jsonl, streamed: TypeError
#   missing-20MB.jsonl, loaded: DatasetGenerationError from CastError
#   missing-20MB.jsonl, streamed: CastError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import json

import datasets


def write(name, first, megabytes):
    with open(name, "w") as file:
        for _ in range(megabytes + 1):
            file.write(json.dumps({"text": "x" * 1_000_000, **first}) + "\n")
        file.write(json.dumps({"text": "x", "source": "a book"}) + "\n")


def read(name, streaming):
    try:
        rows = datasets.load_dataset("json", data_files=name, split="train", streaming=streaming, cache_dir="cache")
        told = f"{sum(1 for _ in rows)} rows, source is {rows.features['source'].dtype}"
    except Exception as error:
        cause = "" if error.__cause__ is None else f" from {type(error.__cause__).__name__}"
        told = type(error).__name__ + cause
    print(f"{name}, {'streamed' if streaming else 'loaded'}: {told}")
    return told


write("null-2MB.jsonl", {"source": None}, 2)
write("null-20MB.jsonl", {"source": None}, 20)
write("missing-2MB.jsonl", {}, 2)
write("missing-20MB.jsonl", {}, 20)
assert read("null-2MB.jsonl", False) == "4 rows, source is string"
assert read("missing-2MB.jsonl", False) == "4 rows, source is string"
assert read("null-20MB.jsonl", False) == "DatasetGenerationError from TypeError"
assert read("null-20MB.jsonl", True) == "TypeError"
assert read("missing-20MB.jsonl", False) == "DatasetGenerationError from CastError"
assert read("missing-20MB.jsonl", True) == "CastError"
PYTHON
