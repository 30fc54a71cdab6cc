"""Draw docs/img/perplexity.svg, perplexity over size, from docs/data/perplexity.csv.

    python docs/img/perplexity.py

A perplexity is divided by the base model's on the same sequences, because rows were measured on 148 or on 40 of them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "perplexity"  # the same bytes at every run
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
CURVE = ("1 bit", "2 bits", "3 bits", "4 bits")


def main() -> None:
    with open(HERE.parent / "data" / "perplexity.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    base = {row["sequences"]: float(row["perplexity"]) for row in rows if row["result"] == "base"}
    points = {
        row["result"]: (float(row["megabytes"]), float(row["perplexity"]) / base[row["sequences"]])
        for row in rows
        if row["megabytes"]
    }
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.plot(*zip(*[points[name] for name in CURVE], strict=True), "o-", color="#3949ab", label="aqlm quantize")
    axes.plot(*points["2 bits finetuned longer"], "D", color="#d81b60", label="2 bits after aqlm finetune")
    axes.plot(*points["base"], "s", color="#455a64", label="base model, 16 bits")
    axes.axhline(1, color="#455a64", linewidth=0.8, linestyle=":")
    for name in CURVE:
        axes.annotate(name, points[name], xytext=(7, 4), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set(xlim=(55, 285), ylim=(0.85, 32))
    axes.set_xlabel("size of the checkpoint in MB, embeddings and head included")
    axes.set_ylabel("perplexity / base model's")
    axes.set_title("SmolLM2-135M-Instruct on WikiText-2", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(HERE / "perplexity.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
