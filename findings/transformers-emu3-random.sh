#!/usr/bin/env bash
# transformers 5.23.0: `AutoModelForCausalLM.from_pretrained` of a saved Emu3ForConditionalGeneration gives an
# Emu3ForCausalLM of random weights. The auto class names that one for the config `emu3`, and the files have the text
# model, as `text_model.model...` and `text_model.lm_head`; but only the class that was saved renames these. No
# exception is raised; a table is logged in which every key is missing. One would expect the weights of the text model,
# or an error.
#
# Here: a model whose saved class is not one of a causal language model is refused, and so is any missing key.
#
# It printed:
#   Emu3ForConditionalGeneration of 190 tensors: 0 missing, 0 unexpected
#       relative difference of the logits: 0.00
#   Emu3ForCausalLM of 21 tensors: 21 missing, 190 unexpected
#       relative difference of the logits: 1.40
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.23.0 torch==2.13.0 numpy==2.4.6

HF_HUB_OFFLINE=1 venv/bin/python - 2>errors.txt <<'PYTHON' || { cat errors.txt >&2; exit 1; }
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Emu3Config, Emu3ForConditionalGeneration

text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
text |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
image = {"base_channels": 32, "channel_multiplier": [1], "codebook_size": 8, "embed_dim": 8, "hidden_size": 32}
image |= {"num_res_blocks": 1, "latent_channels": 8, "z_channels": 8}
words = {"<image>": 1, "<|extra_200|>": 1, "<|visual token 000000|>": 0}
config = Emu3Config(text_config=text, vq_config=image, vocabulary_map=words)
saved = Emu3ForConditionalGeneration(config).eval()
saved.save_pretrained("emu3")
ids = torch.arange(10)[None]


def load(auto):
    network, report = auto.from_pretrained("emu3", output_loading_info=True)
    missing, unexpected = len(report["missing_keys"]), len(report["unexpected_keys"])
    with torch.no_grad():
        wanted, given = saved(input_ids=ids).logits, network(input_ids=ids).logits
    error = float((given - wanted).norm() / wanted.norm())
    of_all = len(network.state_dict())
    print(f"{type(network).__name__} of {of_all} tensors: {missing} missing, {unexpected} unexpected")
    print(f"    relative difference of the logits: {error:.2f}")
    return missing / of_all, error


assert load(AutoModelForImageTextToText) == (0, 0)
missing, error = load(AutoModelForCausalLM)
assert missing == 1 and error > 0.5, "not what was found"
PYTHON
