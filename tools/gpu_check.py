"""One check of a GPU: kernels, matmuls, a block, a model. Each part has a time limit, and its result is on the disk
before the next starts.

    python tools/gpu_check.py --out runs/gpu-check [--model NAME] [--minutes 2.5]        # `make gpu-check`

It needs no package index and writes `gpu-check.json` and `gpu-check.md` into OUT after every part. It ends within
eight minutes, whatever a part does: a part that has not ended by its limit is killed, with all that it has started, and
what it had measured by then is kept. `--device cpu --tiny` tries the parts without a GPU, on shapes that take no time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
import gpu_wheels

ROOT = Path(__file__).parents[1]
PARTS_FILE = Path(__file__).with_name("gpu_parts.py")
LIBRARIES = ROOT / ".gpu-check"
"""Folder for packages that this machine lacks; git ignores it."""

SECONDS = 460.0
"""Time limit of all parts together; 20 seconds of eight minutes are left to start Python, to kill and to write."""


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    seconds: float


def parts(minutes: float) -> tuple[Part, ...]:
    """All parts, the most valuable one first."""
    return (
        Part("kernels", "kernel tests on the device", 90),
        Part("matmul", "matmuls beside torch's", 100),
        Part("block", "code search and fitting of a block of Llama-2-7B's shape", 100),
        Part("model", "quantizing and distilling a model", 60 * minutes),
    )


def main() -> None:
    options = parse()
    started, deadline = time.monotonic(), time.monotonic() + options.seconds
    refuse_without_device(options.device)
    make_folder(options.out)
    gpu_wheels.install(options.wheels, LIBRARIES)
    results: dict[str, Any] = {"machine": machine(options.device), "parts": {}}
    for part in parts(options.minutes):
        if options.only and part.name not in options.only:
            continue
        limit = min(options.limit or part.seconds, deadline - time.monotonic())
        results["parts"][part.name] = run_part(part, limit, options)
        results["seconds"] = round(time.monotonic() - started, 1)
        write(options.out, results)
    print((options.out / "gpu-check.md").read_text())
    raise SystemExit(0 if all(part["state"] == "finished" for part in results["parts"].values()) else 1)


def parse() -> argparse.Namespace:
    parser = Parser(description="Check kernels, matmuls, a block and a model on this machine's GPU.")
    parser.add_argument("--out", type=folder, required=True, help="folder for the results")
    parser.add_argument("--model", default="smollm2-135m", help="a model, or a shape of which random weights are made")
    parser.add_argument("--minutes", type=minutes, default=2.5, help="for quantizing and distilling it, at most")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="what `make gpu-wheels` has filled")
    parser.add_argument("--device", default="cuda", help="cpu: try the parts where there is no GPU")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time; the numbers mean nothing")
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--limit", type=float, help="seconds for each part, in place of its own limit")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    return parser.parse_args()


def minutes(text: str) -> float:
    """Number of minutes in `text`, positive and finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes; give one such as MINUTES=2.5")
    return number


def folder(text: str) -> Path:
    """The folder of this name; without one, results would lie about in the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("no folder is named; give one such as OUT=runs/gpu-check")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def make_folder(out: Path) -> None:
    """Make OUT; end where it cannot be made or written to, before anything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise SystemExit(f"error: --out {out}: {error.strerror}; choose another folder with OUT=") from None


def refuse_without_device(device: str) -> None:
    try:
        import torch
    except ImportError:
        raise SystemExit(f"error: {sys.executable} has no torch; choose another Python with PYTHON=") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU on this machine; run `make gpu-check` where there is one")


def machine(device: str) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for package in ("torch", "triton", "transformers", "numba"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "python": platform.python_version(), **versions}


def run_part(part: Part, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """State, seconds, and the rows that the part has written by its end or its limit."""
    rows, log = options.out / f"{part.name}.jsonl", options.out / f"{part.name}.log"
    rows.unlink(missing_ok=True)
    if limit < 1:
        return {"title": part.title, "state": "no time was left", "seconds": 0.0, "rows": []}
    command = [sys.executable, str(PARTS_FILE), part.name, "--rows", str(rows), "--device", options.device]
    command += ["--model", options.model, "--seconds", f"{limit:.0f}", *(["--tiny"] if options.tiny else [])]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit)
            state = "finished" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
        finally:
            kill(process)
    seconds = round(time.monotonic() - started, 1)
    print(f"{part.name}: {state}, {seconds} s", file=sys.stderr)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    tail = [] if state == "finished" else log.read_text(errors="replace").splitlines()[-15:]
    return {"title": part.title, "state": state, "seconds": seconds, "rows": found, "log": tail}


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a part with all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    path = [str(LIBRARIES), str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}


def write(out: Path, results: dict[str, Any]) -> None:
    (out / "gpu-check.json").write_text(json.dumps(results, indent=1))
    lines = [f"# {results['machine']['device']}", "", ", ".join(f"{k} {v}" for k, v in results["machine"].items()), ""]
    for part in results["parts"].values():
        lines += [f"## {part['title']}: {part['state']}, {part['seconds']} s", "", *table(part["rows"])]
        lines += ["", "```", *part["log"], "```", ""] if part.get("log") else [""]
    (out / "gpu-check.md").write_text("\n".join(lines))


def table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no row"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = [[str(row.get(name, "")) for name in columns] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *body)]


if __name__ == "__main__":
    main()
