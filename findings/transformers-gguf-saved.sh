#!/usr/bin/env bash
# transformers 5.23.0 (with gguf 0.19.0): `from_pretrained(..., gguf_file=...)` makes ordinary float32 weights in
# ordinary linear layers of a GGUF, and marks the model as quantized all the same. `save_pretrained` and `float()`
# then raise ValueError. One would expect to save what is a float32 model by now, which is what this way of loading is
# for.
#
# Here: a GGUF is converted by ourselves, and nothing of the mark reaches what we save.
#
# It printed:
#   a layer is <class 'torch.nn.modules.linear.Linear'>, its weight torch.float32 [64, 64]
#   save_pretrained: ValueError: The model is quantized with gguf and is not serializable ...
#   float: ValueError: `.float()` is not supported for quantized model. ...
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
from transformers import AutoModelForCausalLM

writer, kind = gguf.GGUFWriter("model.gguf", "llama"), gguf.GGMLQuantizationType.Q8_0
writer.add_context_length(64)
writer.add_embedding_length(64)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(64)
writer.add_tokenizer_model("no_vocab")
matrices = ["token_embd", "output", *(f"blk.0.attn_{name}" for name in ("q", "k", "v", "output"))]
matrices += [f"blk.0.ffn_{name}" for name in ("gate", "up", "down")]
for name in matrices:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
for name in ("output", "blk.0.attn", "blk.0.ffn"):
    writer.add_tensor(f"{name}_norm.weight", np.ones(64, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

network = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")
layer = network.model.layers[0].self_attn.q_proj
print(f"a layer is {type(layer)}, its weight {layer.weight.dtype} {list(layer.weight.shape)}")
refused = 0
for name, call in {"save_pretrained": lambda: network.save_pretrained("saved"), "float": network.float}.items():
    try:
        call()
    except ValueError as error:
        refused += 1
        print(f"{name}: ValueError: {str(error)[:90]}")
assert refused == 2, "not what was found"
PYTHON
