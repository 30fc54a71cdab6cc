#!/usr/bin/env bash
# transformers 5.23.0 (with gguf 0.19.0): of a GGUF that is split into several files, which llama.cpp loads by the name
# of the first, only that file is read. No exception is raised. The tensors of the other files are random, which a
# logged table of missing keys tells; the head is tied to the embeddings, since `output.weight` is not in the first
# file, and nothing tells that. The keys of the file say that there are more (`split.count`). One would expect all files
# to be read, as the shards of safetensors are, or an error.
#
# Here: all parts are read, the head is tied only where no part has one, and a part that is not there is an error.
#
# It printed:
#   whole.gguf: 0 missing keys, tie_word_embeddings=False
#   split-00001-of-00003.gguf: 7 missing keys, tie_word_embeddings=True
#   mean difference of a weight from the file's: 1.00
#   ...
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
SHAPES = {"token_embd.weight": (TOKENS, WIDTH), "blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,)}
SHAPES |= {f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
SHAPES |= {f"blk.0.ffn_{name}.weight": (WIDE, WIDTH) for name in ("gate", "up")}
SHAPES |= {"blk.0.ffn_down.weight": (WIDTH, WIDE), "output_norm.weight": (WIDTH,), "output.weight": (TOKENS, WIDTH)}


def write(path, tensors_of_a_part):
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_of_a_part)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in SHAPES.items():
        writer.add_tensor(name, 1 + 0.2 * draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(name):
    network, report = AutoModelForCausalLM.from_pretrained(".", gguf_file=name, output_loading_info=True)
    missing, tied = len(report["missing_keys"]), network.config.tie_word_embeddings
    print(f"{name}: {missing} missing keys, tie_word_embeddings={tied}")
    return missing, tied, network.model.layers[0].self_attn.o_proj.weight


write("whole.gguf", 0)
write("split.gguf", 4)
missing, tied, weight = load("whole.gguf")
assert (missing, tied) == (0, False)
for _ in range(2):
    missing, tied, random = load("split-00001-of-00003.gguf")
    assert missing > 0 and tied, "not what was found"
    difference = float((random - weight).detach().abs().mean())
    print(f"mean difference of a weight from the file's: {difference:.2f}")
    assert difference > 0.1, "not what was found"
PYTHON
