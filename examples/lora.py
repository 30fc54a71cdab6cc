"""Train LoRA adapters with peft on a packed model; codes, codebooks and scales stay as they are.

    python examples/lora.py runs/demo/packed

Needs `aqlm[cpu]==1.1.7` and `peft`.
"""

from __future__ import annotations

import os
import sys

os.environ["NUMBA_NUM_THREADS"] = "1"  # before anything imports Numba: aqlm 1.1.7 is wrong with more threads on a CPU

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_kernels import AdditiveLinear, patch_transformers

TEXT = "The answer to every question is forty-two. " * 8


def main(directory: str = "runs/demo/packed", steps: int = 20) -> None:
    model = patch_transformers(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=8)
    config._register_custom_module({AdditiveLinear: AqlmLoraLinear})  # peft has no public way to name a layer of others
    model = get_peft_model(model, config)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for step in range(int(steps)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained("lora-adapter")
    print("wrote lora-adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
