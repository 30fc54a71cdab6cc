#!/usr/bin/env bash
# transformers 5.23.0 (with gguf 0.19.0): of a GGUF with the architecture llama, tensors that the network has no place
# for are left out, here the biases of the attention and `rope_freqs.weight`, with which llama.cpp computes. The
# logits are those of a file without them. One would expect the names among `unexpected_keys` of the report, as for
# safetensors; it is empty.
#
# Here: a GGUF is read against the list of its own tensors, so that none is left out in silence.
#
# It printed:
#   plain.gguf: 12 tensors, {'missing_keys': [], 'unexpected_keys': [], 'mismatched_keys': [], 'error_msgs': []}
#   more.gguf: 17 tensors, {'missing_keys': [], 'unexpected_keys': [], 'mismatched_keys': [], 'error_msgs': []}
#   the logits are the same: True
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
import torch
from transformers import AutoModelForCausalLM

WIDTH, WIDE, TOKENS = 64, 128, 32
SHAPES = {"token_embd.weight": (TOKENS, WIDTH), "output.weight": (TOKENS, WIDTH), "output_norm.weight": (WIDTH,)}
SHAPES |= {f"blk.0.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
SHAPES |= {f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
SHAPES |= {f"blk.0.ffn_{name}.weight": (WIDE, WIDTH) for name in ("gate", "up")}
SHAPES |= {"blk.0.ffn_down.weight": (WIDTH, WIDE)}
MORE = {f"blk.0.attn_{name}.bias": (WIDTH,) for name in ("q", "k", "v", "output")} | {"rope_freqs.weight": (8,)}


def write(path, shapes):
    draw, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in shapes.items():
        writer.add_tensor(name, 1 + 0.2 * draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(name):
    network, report = AutoModelForCausalLM.from_pretrained(".", gguf_file=name, output_loading_info=True)
    tensors = gguf.GGUFReader(name).tensors
    print(f"{name}: {len(tensors)} tensors,", {key: sorted(names) for key, names in report.items()})
    assert not any(report.values()), "not what was found"
    with torch.no_grad():
        return network(torch.arange(10)[None]).logits


write("plain.gguf", SHAPES)
write("more.gguf", SHAPES | MORE)
same = torch.equal(logits("plain.gguf"), logits("more.gguf"))
print("the logits are the same:", same)
assert same, "not what was found"
PYTHON
