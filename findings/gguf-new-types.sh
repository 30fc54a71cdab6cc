#!/usr/bin/env bash
# gguf 0.19.0: a file in which one tensor has a type that came to ggml later, such as Q2_0 (number 42, blocks of 64
# weights in 18 bytes), cannot be opened: the reader raises a ValueError of Python's enum, and no key and no other
# tensor can be read. One would expect that only this tensor cannot. Q1_0 (41) has a name and opens, and then neither
# dequantizes nor quantizes.
#
# Here: the header and both types are read by ourselves; a type that neither gguf nor we can read is refused in a line
# with its name or number.
#
# It printed:
#   Q1_0: Dequantization for Q1_0 is not yet implemented
#   Q2_0: np.uint32(42) is not a valid GGMLQuantizationType
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile gguf==0.19.0 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import gguf
import numpy as np

ORDINARY, Q1_0, Q2_0 = np.ones(64, np.float32), 41, 42


def write(path, number, bytes_of_a_row):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", ORDINARY)
    blocks = np.zeros((4, bytes_of_a_row), np.uint8)
    writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q1_0)
    # The writer has no name for newer types: their number, behind the name and the two sizes, is put in afterwards.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(open(path, "rb").read())
    place = data.index(b"output.weight") + len("output.weight") + 4 + 2 * 8
    assert int.from_bytes(data[place : place + 4], "little") == Q1_0
    data[place : place + 4] = number.to_bytes(4, "little")
    open(path, "wb").write(data)


write("q1_0.gguf", Q1_0, 4 * 18)  # 4 blocks of 128 weights
tensors = gguf.GGUFReader("q1_0.gguf").tensors
assert np.array_equal(tensors[0].data, ORDINARY)
try:
    gguf.dequantize(tensors[1].data, tensors[1].tensor_type)
except NotImplementedError as error:
    print("Q1_0:", error)
else:
    raise SystemExit("not what was found: Q1_0 dequantizes")

write("q2_0.gguf", Q2_0, 8 * 18)  # as many bytes: 8 blocks of 64 weights; the sizes in the header are rewritten below
data = bytearray(open("q2_0.gguf", "rb").read())
place = data.index(b"output.weight") + len("output.weight") + 4
data[place : place + 8] = (8 * 64).to_bytes(8, "little")
open("q2_0.gguf", "wb").write(data)
try:
    gguf.GGUFReader("q2_0.gguf")
except ValueError as error:
    print("Q2_0:", error)
else:
    raise SystemExit("not what was found: the file opens")
PYTHON
