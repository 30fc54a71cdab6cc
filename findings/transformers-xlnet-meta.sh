#!/usr/bin/env bash
# transformers 5.23.0: an XLNet that is made on the meta device has half of its parameters in memory all the same. Its
# attention makes them with `torch.FloatTensor(...)`, which heeds neither `torch.device` nor `dtype`, and nothing
# initialises them: there are whatever numbers were in that memory, NaN and 1e38 among them. One would expect what other
# families give, here GPT-2: names and shapes alone, which take no memory.
#
# Here: blocks that shall be names and shapes alone are moved to the meta device once more.
#
# It printed:
#   GPT2LMHeadModel: 0 of 28 parameters in memory, 0.0 MB
#   XLNetLMHeadModel: 19 of 37 parameters in memory, 2.6 MB
#       transformer.layer.0.rel_attn.q: torch.float32 [256, 4, 64]
#       ...
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 torch==2.13.0 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import torch
from transformers import AutoModelForCausalLM, GPT2Config, XLNetConfig


def in_memory(config):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    real = {name: parameter for name, parameter in network.named_parameters() if not parameter.is_meta}
    of_all = sum(1 for _ in network.parameters())
    megabytes = sum(parameter.nbytes for parameter in real.values()) / 1e6
    print(f"{type(network).__name__}: {len(real)} of {of_all} parameters in memory, {megabytes:.1f} MB")
    for name in [name for name in real if ".layer.0." in name][:3]:
        print(f"    {name}: {real[name].dtype} {list(real[name].shape)}")
    return len(real)


assert in_memory(GPT2Config(n_layer=2, n_embd=256, n_head=4)) == 0
assert in_memory(XLNetConfig(n_layer=2, d_model=256, n_head=4, d_inner=512)) > 0, "not what was found"
PYTHON
