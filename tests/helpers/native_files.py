"""Native checkpoints of tiny models, written by hand from the format's description, so that they can judge readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

SCHEMES: Mapping[str, str] = {
    "q_proj": "2x8g8",
    "o_proj": "3x4g4",
    "k_proj": "int4g32",
    "down_proj": "int3g16",
    "gate_proj": "2x5g8c8",
}
"""A mix, by the last name of a layer: bits that fill bytes and bits that do not."""


def packed_bits(values: Tensor, bits: int) -> Tensor:
    """Bit b of value i is bit i * bits + b of the bytes, each of which begins with its lowest bit."""
    digits = (values.flatten().numpy()[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(digits.astype(np.uint8).ravel(), bitorder="little"))


def random_packed(scheme: str, rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a matrix of this scheme, as a file holds them, and the weight that they stand for."""
    draw = torch.Generator().manual_seed(seed)
    if scheme.startswith("int"):
        bits, group = map(int, scheme[3:].split("g"))
        levels = torch.randint(0, 2**bits, (rows, columns), generator=draw)
        zeros = torch.randint(0, 2**bits, (rows, columns // group), generator=draw)
        scales = (0.08 * (0.5 + torch.rand(rows, columns // group, generator=draw))).half()
        steps = levels.float() - zeros.float().repeat_interleave(group, 1)
        weight = steps * scales.float().repeat_interleave(group, 1) / 4
        exponent = torch.tensor(-2, dtype=torch.int16)
        packed = {"levels": packed_bits(levels, bits), "zeros": packed_bits(zeros, bits), "scales": scales}
        return {**packed, "exponent": exponent}, weight
    books, rest = scheme.removesuffix("c8").split("x")
    count, (bits, group) = int(books), map(int, rest.split("g"))
    codes = torch.randint(0, 2**bits, (rows, columns // group, count), generator=draw)
    codebooks = (0.1 * torch.randn(count, 2**bits, group, generator=draw)).half()
    tables = {"codebooks": codebooks}
    if scheme.endswith("c8"):
        levels = torch.randint(-127, 128, codebooks.shape, generator=draw, dtype=torch.int8)
        levels[:, 0] = 127  # the range of a place is its largest number
        ranges = (0.1 + 0.2 * torch.rand(count, group, generator=draw)).half()
        codebooks = (levels.double() * ranges.double()[:, None] / 127).half()
        tables = {"codebooks": levels, "ranges": ranges}
    scales = (0.5 + torch.rand(rows, generator=draw)).half()
    total = sum(codebooks[m].float()[codes[..., m]] for m in range(count))  # [out, n, g]
    weight = total.flatten(1) * scales.float()[:, None]  # type: ignore[union-attr]
    return {"codes": packed_bits(codes, bits), **tables, "scales": scales}, weight


def save_native(original: Path, directory: Path, tables: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A native checkpoint with the skeleton of `original`; returns the weights it stands for, by path.

    The linear layers of the blocks get the mix of SCHEMES, and `tables` are schemes of embeddings and heads by path.
    """
    network = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16)
    tied: dict[str, str] = network.all_tied_weights_keys
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in tied}
    weights: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for path, module in network.named_modules():
        scheme = (tables or {}).get(path) or (SCHEMES.get(path.rpartition(".")[2]) if ".layers." in path else None)
        if scheme is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        duty = "linear" if ".layers." in path else "head" if isinstance(module, nn.Linear) else "embedding"
        duty = "table" if f"{path}.weight" in tied.values() else duty
        packed, weights[path] = random_packed(scheme, *module.weight.shape, seed=len(layers))
        layers[path] = {"scheme": scheme, "kind": "uniform" if "int" in scheme else "additive", "duty": duty}
        del state[f"{path}.weight"]
        state |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
    shutil.copytree(original, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    described = {"quant_method": "aqlm_native", "version": 1, "layers": layers}
    edit_config(directory, dtype="float16", quantization_config=described)
    return weights


def edit_config(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def dense_network(original: Path, weights: Mapping[str, Tensor]) -> Any:
    """The model in the 16 bits of its checkpoint, computing in float32, with these weights in place of its own."""
    network = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16).float().eval()
    for path, weight in weights.items():
        network.get_submodule(path).weight.data = weight.clone()  # of a tied pair, both
    return network
