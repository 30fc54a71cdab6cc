"""The README.md of an exported checkpoint: its origin, its size, its quality, and how to load it.

It is written for whoever is given the checkpoint, so it holds nothing of the machine that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from aqlm_cli.formatting import counted, readable_bytes, text_name

TEMPLATE = """\
---
{front_matter}---

# {title}

{origin} with the weights of {layers} linear layers compressed by `aqlm` ({made_by}).

| | |
|---|---|
| bits per compressed weight | {nominal_bits:.3f}, with codebooks and scales |
| bits per compressed weight in these files | {stored_bits:.3f} |
| size of all tensors | {size}, embeddings and head included |
{data}{measured}
## Loading

{loading}"""

DENSE_LOADING = """\
An ordinary 16-bit checkpoint: `pip install transformers`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""

LOADING = """\
On a CPU, `pip install transformers accelerate "aqlm[cpu]==1.1.7"`:

```python
import os

os.environ["NUMBA_NUM_THREADS"] = "1"  # before anything imports Numba

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

- `NUMBA_NUM_THREADS=1` is needed: in the CPU product of aqlm 1.1.7 all of Numba's threads add into one vector, and with
  more than one thread logits are wrong. `torch.set_num_threads` does not reach these threads.
- To save the model again, load it again first: at its first product on a CPU that version transposes `codes` in place,
  and what is saved afterwards does not load, or loads and is wrong.
- With an NVIDIA GPU install `aqlm[gpu]==1.1.7` and load with `dtype="auto", device_map="cuda"`; there neither applies.
"""

NATIVE_LOADING = """\
Codes of every matrix, the embeddings included where they are quantized. `pip install aqlm-cli`, then:

```python
import aqlm_kernels  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

`generate`, `save_pretrained` and LoRA adapters of `peft` work as with any model; codes stay as they are.
"""


@dataclass(frozen=True)
class Origin:
    """Method and text that made a model, None where not known, and reports on it, as JSON: of `eval-ppl`, and of the
    gate and of `bench` where there are any."""

    method: str | None = None
    data: str | None = None
    perplexities: Sequence[Mapping[str, Any]] = ()
    gate: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ExportFacts:
    """Size of an exported model.

    `nominal_bits` per quantized weight are the scheme's, `stored_bits` those in the files. `bytes` counts every tensor,
    embeddings and head included.
    """

    format: str
    scheme: str
    nominal_bits: float
    stored_bits: float
    bytes: int
    layers: int


@dataclass(frozen=True)
class CardFacts:
    """Everything a card tells."""

    short_name: str
    base_model: str | None
    licence: str | None
    size: ExportFacts
    origin: Origin


def model_card(facts: CardFacts, loading: str, tags: Sequence[str] = ()) -> str:
    """The card; `loading` is its last section, and `tags` follow those that every quantized model has."""
    size, origin = facts.size, facts.origin
    front_matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantized", "text-generation", *tags],
    }
    if facts.base_model is not None:
        front_matter |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    if facts.licence is not None:
        front_matter["license"] = facts.licence
    return TEMPLATE.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=True),
        title=f"{facts.short_name}, {size.nominal_bits:.2f} bits",
        origin=facts.base_model or facts.short_name,
        layers=size.layers,
        made_by=", ".join([*([origin.method] if origin.method else []), size.scheme]),
        nominal_bits=size.nominal_bits,
        stored_bits=size.stored_bits,
        size=readable_bytes(size.bytes),
        data="" if origin.data is None else f"| calibration text | {origin.data} |\n",
        measured="".join(
            [
                *map(_perplexity_row, origin.perplexities),
                *(_gate_row(origin.gate) if origin.gate else ()),
                *(_speed_row(origin.speed) if origin.speed else ()),
            ]
        ),
        loading=loading,
    )


def _gate_row(report: Mapping[str, Any]) -> Iterator[str]:
    collapsed = f"collapsed: {'; '.join(report['reasons'])}" if report["reasons"] else "it has not collapsed"
    told = f"{report['distinct']:.0%} of the 3-grams are new, {report['base_distinct']:.0%} of its base model's"
    yield (
        f"| greedy text after {len(report['samples'])} prompts, up to {report['tokens']} tokens | {told}; "
        f"{report['surprise']:.2f} nats a token by the base model, {report['base_surprise']:.2f} of its own; "
        f"{collapsed} |\n"
    )


def _speed_row(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["rows"]:
        if row["name"] == "packed":
            beside = ", ".join(f"{times:.2f} x {name}" for name, times in row["decode_times"].items())
            threads = counted(report["threads"], "CPU thread")
            yield f"| decoding, {threads} | {row['decode_median']:.1f} tokens/s, {beside} |\n"


def _perplexity_row(report: Mapping[str, Any]) -> str:
    length = f"{report['sequences']} sequences of {report['sequence_length']} tokens"
    length += ", each with a beginning token" if report.get("bos") else ""
    length += f", protocol {report['protocol']}" if "protocol" in report else ""
    formats = report.get("passport", {}).get("formats")
    length += f", {formats}" if formats else ""
    measured = f"{report['perplexity']:.2f} ± {report['stderr']:.2f}"
    base = report["base_model"]
    beside = f", base model {base['perplexity']:.2f} ± {base['stderr']:.2f}" if base else ""
    row = f"| perplexity, {text_name(report['data'])}, {length} | {measured}{beside} |\n"
    kl = report.get("divergence")
    if kl:
        told = f"KL {kl['mean']:.3f} ± {kl['stderr']:.3f} nats a token, {kl['agreement']:.1%} the same likeliest token"
        row += f"| divergence from the base model, same text | {told} |\n"
    return row
