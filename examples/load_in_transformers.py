"""Load a packed model in stock transformers, then on the kernels of this project, and compare the logits.

    python examples/load_in_transformers.py runs/demo/packed

Needs `aqlm[cpu]==1.1.7`, the inference package that transformers loads AQLM checkpoints with.
"""

from __future__ import annotations

import os
import sys

os.environ["NUMBA_NUM_THREADS"] = "1"  # before anything imports Numba: aqlm 1.1.7 is wrong with more threads on a CPU

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aqlm_kernels import patch_transformers


def main(directory: str = "runs/demo/packed") -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        stock = model(**inputs).logits
        model = patch_transformers(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
        patched = model(**inputs).logits
    difference = float((stock - patched).norm() / stock.norm())
    print(f"relative difference of the logits: {difference:.1e}")
    new = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(new[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
