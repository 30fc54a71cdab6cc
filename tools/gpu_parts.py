"""The parts of `tools/gpu_check.py`, each a process of its own. A row is appended to a file as soon as it is known.

python tools/gpu_parts.py matmul --rows OUT/matmul.jsonl --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

SHAPES = ((4096, 4096), (4096, 11008), (8192, 28672))
ROWS = (1, 4, 16, 512)
SCHEMES = ((2, 8, 8), (1, 16, 8))
"""Codebooks, bits of a code, group size."""

ROTATED = 2**28
"""Bytes of weights that a pass reads, more than the cache of a GPU holds."""

BLOCKS = 2
"""Quantized of the model, so that distillation has its turn."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    PARTS[options.part](options)


def tell(options: argparse.Namespace, **row: Any) -> None:
    with options.rows.open("a") as file:
        file.write(json.dumps({name: rounded(value) for name, value in row.items()}) + "\n")


def rounded(value: Any) -> Any:
    """Round to four digits, for the tables."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------------------- kernel tests


def kernels(options: argparse.Namespace) -> None:
    report = options.rows.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", options.device]
    command += [str(ROOT / "tests/kernels/test_device.py"), *(["-k", "2x8g8"] if options.tiny else [])]
    done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT)
    from xml.etree import ElementTree

    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tell(options, **{name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")})
    report.unlink()
    raise SystemExit(done.returncode)


# --------------------------------------------------------------------------------------------------------------- matmul


def matmul(options: argparse.Namespace) -> None:
    """y of every shape and number of rows; with 512 rows also y and all its gradients, as training computes them."""
    device = torch.device(options.device)
    bandwidth = memory_bandwidth(device, options.tiny)
    shapes = [(64, 128)] if options.tiny else SHAPES
    # The smallest shape of all schemes first, should the time not do for all.
    for out_features, in_features in shapes:
        for scheme in SCHEMES[:1] if options.tiny else SCHEMES:
            layer, exact = additive_layer(out_features, in_features, scheme, device)
            size = sum(tensor.nbytes for tensor in (layer.codes, layer.scales))
            name = f"{scheme[0]}x{scheme[1]}g{scheme[2]}"
            for rows in (1, 4) if options.tiny else ROWS:
                for dtype in (torch.float16, torch.bfloat16):
                    tell(
                        options,
                        out=out_features,
                        **{"in": in_features},
                        rows=rows,
                        scheme=name,
                        type=str(dtype).removeprefix("torch."),
                        **forward_row(layer, exact, rows, dtype, size, bandwidth, options.tiny),
                    )
            training = training_row(layer, exact, 8 if options.tiny else ROWS[-1], torch.bfloat16, options.tiny)
            tell(options, out=out_features, **{"in": in_features}, scheme=f"{name}, with gradients", **training)


def forward_row(
    layer: nn.Module, exact: Tensor, rows: int, dtype: torch.dtype, size: int, bandwidth: float, tiny: bool
) -> dict[str, Any]:
    x = torch.randn(rows, exact.shape[1], device=exact.device).to(dtype)
    copies = copies_of(size, tiny)
    layers = [layer, *(clone(layer) for _ in range(copies - 1))]
    weights = [exact.to(dtype) for _ in range(copies_of(exact.numel() * 2, tiny))]
    with torch.no_grad():
        found = layer(x).double()
        wanted = x.double() @ exact.double().T
        ours = seconds_of([lambda one=one: one(x) for one in layers], exact.device, tiny)
        torchs = seconds_of([lambda one=one: nn.functional.linear(x, one) for one in weights], exact.device, tiny)
    return {
        "microseconds": 1e6 * ours,
        "torch": 1e6 * torchs,
        "times torch": torchs / ours,
        "share of bandwidth": size / ours / bandwidth,
        "error": float((found - wanted).norm() / wanted.norm()),
    }


def training_row(layer: nn.Module, exact: Tensor, rows: int, dtype: torch.dtype, tiny: bool) -> dict[str, Any]:
    """Forward and backward; torch's has the gradient of W where ours has those of codebooks and scales."""
    x = torch.randn(rows, exact.shape[1], device=exact.device).to(dtype).requires_grad_()
    dy = torch.randn(rows, exact.shape[0], device=exact.device).to(dtype)
    weight = exact.to(dtype).requires_grad_()
    layer.requires_grad_(True)
    wanted = dy.double() @ exact.double()
    x.grad = None
    layer(x).backward(dy)
    error = float((x.grad.double() - wanted).norm() / wanted.norm())
    ours = seconds_of([lambda: layer(x).backward(dy)], exact.device, tiny)
    torchs = seconds_of([lambda: nn.functional.linear(x, weight).backward(dy)], exact.device, tiny)
    layer.requires_grad_(False)
    row = {"rows": rows, "type": str(dtype).removeprefix("torch."), "microseconds": 1e6 * ours, "torch": 1e6 * torchs}
    return {**row, "times torch": torchs / ours, "error": error}


def additive_layer(
    out_features: int, in_features: int, scheme: tuple[int, int, int], device: torch.device
) -> tuple[nn.Module, Tensor]:
    """A layer of random codes, and the weight `[out, in]` that it stands for."""
    from aqlm_kernels import AdditiveLinear, AdditiveMatrix

    num_codebooks, bits, group_size = scheme
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (out_features, in_features // group_size, num_codebooks), generator=draw)
    codebooks = torch.randn(num_codebooks, 2**bits, group_size, generator=draw) / math.sqrt(num_codebooks * in_features)
    layer = AdditiveLinear(AdditiveMatrix(codes, codebooks, torch.ones(out_features))).to(device)
    layer.requires_grad_(False)
    return layer, layer.matrix().dequantize()


def clone(layer: nn.Module) -> nn.Module:
    """Copy a layer with codes of its own, or the cache would serve them."""
    from aqlm_kernels import AdditiveLinear, AdditiveMatrix

    matrix = layer.matrix()
    return AdditiveLinear(AdditiveMatrix(matrix.codes.clone(), matrix.codebooks, matrix.scales)).requires_grad_(False)


def copies_of(size: int, tiny: bool) -> int:
    return 2 if tiny else max(1, min(64, -(-ROTATED // size)))


def memory_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes a second that a sum over many numbers reads."""
    values = torch.ones(2**16 if tiny else 2**28, device=device, dtype=torch.float32)
    return values.nbytes / seconds_of([values.sum], device, tiny)


def seconds_of(works: list[Callable[[], object]], device: torch.device, tiny: bool) -> float:
    """Median seconds of each piece of work, over several rounds through all, after one to warm up."""
    for work in works:
        work()
    rounds = []
    for _ in range(2 if tiny else 7):
        synchronize(device)
        started = time.perf_counter()
        for work in works:
            work()
        synchronize(device)
        rounds.append((time.perf_counter() - started) / len(works))
    return statistics.median(rounds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------- a block and a model


def block(options: argparse.Namespace) -> None:
    """The first block of random weights in Llama-2-7B's shape, in the settings of the preset `fast`."""
    with tempfile.TemporaryDirectory(prefix="gpu-check.") as work:
        model = random_model("llama-2-7b", Path(work), options.tiny)
        quantize(options, model, Path(work) / "run", blocks=1)


def model(options: argparse.Namespace) -> None:
    """Quantize the first blocks, then distill for half of the time that is left."""
    from aqlm_cli.models.random_models import SHAPES

    with tempfile.TemporaryDirectory(prefix="gpu-check.") as work:
        ends = time.monotonic() + options.seconds
        chosen = options.model
        if not Path(chosen).exists() and chosen in SHAPES:
            chosen = str(random_model(chosen, Path(work), options.tiny))
        run = Path(work) / "run"
        quantize(options, chosen, run, BLOCKS)
        left = ends - time.monotonic()
        flags = ["--steps", "2"] if options.tiny else ["--time-budget", f"{max(5, int(0.5 * left))}s"]
        flags += ["--data", f"builtin:{20 if options.tiny else 80}", "--sequence-length", str(length(options))]
        told = aqlm("finetune", str(run), *flags, "--json")["finetune"]
        tell(options, what="distillation, KL before", value=told["before"])
        tell(options, what="distillation, KL after", value=told["after"])
        tell(options, what="distillation, steps", value=told["steps"], seconds=told["seconds"])
        after = aqlm(
            "generate", str(run), "--prompt", "The capital", "--tokens", "8", "--device", options.device, "--json"
        )
        tell(options, what="tokens generated", value=after["tokens"], seconds=after["seconds"])


def quantize(options: argparse.Namespace, model: Path | str, run: Path, blocks: int) -> None:
    """Quantize the first blocks; their rows come from the log of the run, even where time runs out."""
    chosen = "|".join(str(number) for number in range(blocks))
    command = ["quantize", str(model), "--scheme", "2x4g8" if options.tiny else "2x8g8", "--preset", "fast"]
    command += ["--data", f"builtin:{4 if options.tiny else 32}", "--sequence-length", str(length(options))]
    command += ["--only", rf".*\.({chosen})\..*", "--device", options.device, "--out", str(run), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "aqlm_cli", *command], stdout=subprocess.DEVNULL)
    log, told = run / "logs" / "quantize.jsonl", 0
    while True:
        ended = process.poll() is not None
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines[told:] if ended else lines[told:-1]:  # the last one may be half written
            tell_event(options, json.loads(line))
        told = len(lines) if ended else max(told, len(lines) - 1)
        if ended:
            break
        time.sleep(0.2)
    if process.returncode != 0:
        raise SystemExit(process.returncode)


def tell_event(options: argparse.Namespace, event: dict[str, Any]) -> None:
    if event["event"] == "LayerQuantized":
        tell(options, what=event["path"], value=event["relative_error"], seconds=event["seconds"])
    elif event["event"] == "BlockQuantized":
        tell(options, what=f"block {event['index']}, fitted", value=event["relative_error"], seconds=event["seconds"])


def aqlm(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "aqlm_cli", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def length(options: argparse.Namespace) -> int:
    return 16 if options.tiny else 512


def random_model(shape: str, folder: Path, tiny: bool) -> Path:
    """Two blocks of a shape with random weights in bfloat16, and a tokenizer of single bytes."""
    import transformers
    from helpers.tiny_models import byte_tokenizer

    from aqlm_cli.models.random_models import SHAPES

    hidden, wide, _, heads, key_heads, _, _ = (64, 128, 2, 4, 2, 0, False) if tiny else SHAPES[shape]
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    directory = folder / shape
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def hang(options: argparse.Namespace) -> None:
    """Write a row, then never end, and start a process that never ends: for the test of the limits."""
    tell(options, what="a row before")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    tell(options, what="child", value=child.pid)
    signal.pause()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kernels": kernels,
    "matmul": matmul,
    "block": block,
    "model": model,
    "hang": hang,
}

if __name__ == "__main__":
    main()
