"""Load a model in the native format in stock transformers: generate, save it again, train LoRA adapters, load them.

    aqlm pack runs/demo --format native --overwrite
    python examples/native.py runs/demo/packed

Needs `peft` for the adapters.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import aqlm_kernels  # registers the format with transformers and with peft

TEXT = "The answer to every question is forty-two. " * 8


def main(directory: str = "runs/demo/packed", steps: int = 20) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    print(f"{len(aqlm_kernels.quantized_layers(model))} quantized matrices")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(new[0], skip_special_tokens=True))

    model.save_pretrained("native-copy")
    copy = AutoModelForCausalLM.from_pretrained("native-copy", dtype=torch.float32)
    with torch.no_grad():
        print(f"largest difference after saving: {float((copy(**inputs).logits - model(**inputs).logits).abs().max())}")

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=8, task_type="CAUSAL_LM"))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-3)
    for step in range(int(steps)):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    adapted.save_pretrained("native-adapter")
    loaded = PeftModel.from_pretrained(copy, "native-adapter")
    print(f"loss with the adapter that was saved: {loaded(input_ids=ids, labels=ids).loss.item():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
