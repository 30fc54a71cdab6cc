#!/usr/bin/env bash
# transformers 5.23.0: Bamba, given a cache and no `position_ids`, counts the positions of every call from 0, whatever the
# cache holds, so that each new token stands at position 0 for the attention layers. One would expect the logits of the
# whole text, as Llama and others give them. `generate` is right; a loop of one's own is not, and nothing warns.
#
# Here: our decoding passes positions to every family that takes them.
#
# It printed:
#   relative difference from the logits of the whole text:
#   llama, without positions: below 1e-5
#   bamba, with positions:    below 1e-5
#   bamba, without positions: 0.4, the same numbers as at position 0
#   bamba, generate: the same tokens with a cache and without
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0

venv/bin/python - <<'PYTHON'
import torch
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

shape = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
mamba = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}
torch.manual_seed(0)
networks = {
    "bamba": BambaForCausalLM(BambaConfig(**shape, **mamba)).eval(),
    "llama": LlamaForCausalLM(LlamaConfig(**shape)).eval(),
}
ids = torch.randint(3, 64, (1, 48))


@torch.no_grad()
def difference(name, **positions):
    network = networks[name]
    whole = network(ids).logits[:, -1]
    cache = network(ids[:, :-1], use_cache=True).past_key_values
    last = network(ids[:, -1:], past_key_values=cache, use_cache=True, **positions).logits[:, -1]
    return float((last - whole).norm() / whole.norm())


def generated(use_cache):
    return networks["bamba"].generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache).tolist()


def told(value):
    return "below 1e-5" if value < 1e-5 else f"{value:.1g}"


llama, with_positions = difference("llama"), difference("bamba", position_ids=torch.tensor([[47]]))
without, at_0 = difference("bamba"), difference("bamba", position_ids=torch.tensor([[0]]))
print("relative difference from the logits of the whole text:")
print(f"llama, without positions: {told(llama)}")
print(f"bamba, with positions:    {told(with_positions)}")
print(f"bamba, without positions: {told(without)}, the same numbers as at position 0")
assert llama < 1e-5 and with_positions < 1e-5 and without > 0.01 and without == at_0, "not what was found"
assert generated(True) == generated(False), "not what was found"
print("bamba, generate: the same tokens with a cache and without")
PYTHON
