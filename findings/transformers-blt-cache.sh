#!/usr/bin/env bash
# transformers 5.23.0: the forward of a BltForCausalLM raises AttributeError unless it is told `use_cache=False`, and so
# does `generate`. A cache is made by the count of layers of the config, and BltConfig has one in each of its parts
# (patcher, encoder, decoder, global) and none of its own. One would expect the defaults of a class to work.
#
# Here: calibration and evaluation need no cache and say `use_cache=False`.
#
# It printed:
#   use_cache=False: logits [1, 10, 300]
#   forward: AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'
#   generate: AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 torch==2.13.0 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import torch
from transformers import BltConfig, BltForCausalLM

part = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 300}
half = part | {"hidden_size_global": 64}
config = BltConfig(
    vocab_size=300,
    encoder_hash_byte_group_vocab=64,
    patcher_config=part,
    encoder_config=half,
    decoder_config=half,
    global_config=part,
)
network = BltForCausalLM(config).eval()
ids = torch.arange(10)[None]
refused = 0
with torch.no_grad():
    print("use_cache=False: logits", list(network(input_ids=ids, use_cache=False).logits.shape))
    for name, call in {"forward": network, "generate": network.generate}.items():
        try:
            call(input_ids=ids)
        except AttributeError as error:
            refused += 1
            print(f"{name}: AttributeError: {error}")
assert refused == 2, "not what was found"
PYTHON
