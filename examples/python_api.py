"""Quantize a model, evaluate it and continue a prompt, from Python.

    python examples/python_api.py smollm2-135m

A second argument is a run file with further settings.
"""

from __future__ import annotations

import sys

import aqlm_cli


def main(model: str = "smollm2-135m", config: str | None = None) -> None:
    run = aqlm_cli.quantize(model, bits=2, preset="fast", data="builtin:80", config=config, out="runs/from-python")
    report = run.evaluate(data="builtin")
    print(f"perplexity {report.perplexity:.3f} ± {report.stderr:.3f}, {report.ratio:.3f} times the base model's")
    network, tokenizer = aqlm_cli.load(run.path)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = network.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(new[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
