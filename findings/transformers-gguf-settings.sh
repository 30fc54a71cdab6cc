#!/usr/bin/env bash
# transformers 5.23.0 (with gguf 0.19.0): settings of a GGUF that change its rotary positions do not reach the config,
# and so not the network: a scaling of the context (YaRN, linear), the base of starcoder2, the share of a head that
# phi3 rotates. llama.cpp computes with all of them. One would expect them in `rope_parameters`, or a warning; no word
# of what is logged is about them.
#
# Here: `rope_parameters` is written from the settings of the file, and the frequencies of the network that it makes are
# compared with those of llama.cpp.
#
# It printed:
#   qwen2: {'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0, 'rope.scaling.original_context_length': 64}
#       -> {'rope_theta': 10000.0, 'rope_type': 'default'}
#   llama: {'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0}
#       -> {'rope_theta': 10000.0, 'rope_type': 'default'}
#   starcoder2: {'rope.freq_base': 999999.0}
#       -> {'rope_theta': 10000.0, 'rope_type': 'default'}
#   phi3: {'rope.dimension_count': 8}
#       -> {'rope_theta': 10000.0, 'partial_rotary_factor': 1.0, 'rope_type': 'default'}
#   logged about them: []
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 \
    torch==2.13.0 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import io
import logging

import gguf
import numpy as np
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

logged = io.StringIO()
transformers_logging.get_logger().addHandler(logging.StreamHandler(logged))

FOUND = {
    "qwen2": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    "llama": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "starcoder2": {"rope.freq_base": 999999.0},
    "phi3": {"rope.dimension_count": 8},  # of a head of 16
}


def rope_parameters(architecture, settings):
    writer = gguf.GGUFWriter(f"{architecture}.gguf", architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("no_vocab")
    writer.add_pad_token_id(0)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in settings.items():
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoConfig.from_pretrained(".", gguf_file=f"{architecture}.gguf").rope_parameters


for architecture, settings in FOUND.items():
    without = rope_parameters(architecture, {})
    found = rope_parameters(architecture, settings)
    print(f"{architecture}: {settings}\n    -> {found}")
    assert found == without, "not what was found"
    assert found["rope_type"] == "default" and found["rope_theta"] == 10000.0, "not what was found"
    assert found.get("partial_rotary_factor", 1.0) == 1.0, "not what was found"
about = [line for line in logged.getvalue().splitlines() if "rope" in line.lower() or "scaling" in line.lower()]
print("logged about them:", about)
assert not about, "not what was found"
PYTHON
