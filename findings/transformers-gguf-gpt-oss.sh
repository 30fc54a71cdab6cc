#!/usr/bin/env bash
# transformers 5.23.0 (with gguf 0.19.0): the config of a GGUF of gpt-oss cannot be read where the file has the scaling
# of its positions, as llama.cpp's converter writes it for this family. For the value of a setting it takes the first
# part of the field in the file, which is the length of the name, an array of one number; with NumPy 2.4 `float` of it
# raises TypeError. One would expect YaRN with the factor of the file; `contents()` of the field has it.
#
# Here: such a file is refused in a line with this error.
#
# It printed:
#   without a scaling: gpt_oss
#   the factor of the file is 32.0; the first part of its field is [27]
#   with a scaling: TypeError: only 0-dimensional arrays can be converted to Python scalars
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 \
    torch==2.13.0 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import gguf
import numpy as np
from transformers import AutoConfig


def write(path, scaled):
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_context_length(131072)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("no_vocab")
    writer.add_rope_freq_base(150000.0)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write("plain.gguf", scaled=False)
print("without a scaling:", AutoConfig.from_pretrained(".", gguf_file="plain.gguf").model_type)
write("scaled.gguf", scaled=True)
field = gguf.GGUFReader("scaled.gguf").fields["gpt-oss.rope.scaling.factor"]
print(f"the factor of the file is {field.contents()}; the first part of its field is {field.parts[0]}")
assert field.contents() == 32 and field.parts[0] == len("gpt-oss.rope.scaling.factor")
try:
    AutoConfig.from_pretrained(".", gguf_file="scaled.gguf")
except TypeError as error:
    print("with a scaling: TypeError:", error)
else:
    raise SystemExit("not what was found: the config is read")
PYTHON
