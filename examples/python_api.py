"""Quantize a model, evaluate it and continue a prompt, from Python.

python examples/python_api.py smollm2-135m builtin:80
"""

from __future__ import annotations

import sys

import aqlm_cli


def main(model: str = "smollm2-135m", data: str = "builtin:80") -> None:
    run = aqlm_cli.quantize(model, bits=2, data=data)
    print(run.evaluate())
    network, tokenizer = aqlm_cli.load(run.path)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = network.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(new[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
