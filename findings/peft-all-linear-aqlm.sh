#!/usr/bin/env bash
# peft 0.21.2 has an adapter for the layers of aqlm 1.1.7, and `target_modules="all-linear"` does not find them: it looks
# for nn.Linear and its subclasses, and aqlm's QuantizedLinear is an nn.Module of its own. One would expect adapters on
# every linear layer but the head, as with bitsandbytes. Of a model whose layers all have codes, peft says that there are
# no such modules; of a model in which some layers stay in 16 bits, as AQLM's `linear_weights_not_to_quantize` allows,
# only those get adapters, and nothing says so.
#
# Here: the pages on LoRA name the layers.
#
# It printed:
#   named: 4 adapters, of q_proj, v_proj in 2 blocks
#   all-linear, where v_proj is in 16 bits: 2 adapters, all of v_proj
#   all-linear, where all have codes: NoMatchingPeftModuleError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile \
    "aqlm[cpu]==1.1.7" numba==0.68.1 torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2

venv/bin/python - <<'PYTHON' 2>/dev/null
import torch
from aqlm import QuantizedLinear
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

OPTIONS = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 8}


def network(*not_quantized):
    """A Llama of two blocks whose linear layers hold random codes, but for those named."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ))
    for path, layer in list(made.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head" and not path.endswith(not_quantized or "none"):
            coded = QuantizedLinear(layer.in_features, layer.out_features, bias=False, **OPTIONS)
            made.set_submodule(path, coded)
    return made


def adapters(model, targets):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return [name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("lora_A")]


named = adapters(network(), ["q_proj", "v_proj"])
print(f"named: {len(named)} adapters, of {', '.join(sorted(set(named)))} in 2 blocks")
found = adapters(network("v_proj"), "all-linear")
print(f"all-linear, where v_proj is in 16 bits: {len(found)} adapters, all of {', '.join(sorted(set(found)))}")
try:
    adapters(network(), "all-linear")
except ValueError as error:
    print(f"all-linear, where all have codes: {type(error).__name__}")
else:
    raise SystemExit("not what was found: all-linear finds layers with codes")
assert len(named) == 4 and found == ["v_proj"] * 2, "not what was found"
PYTHON
