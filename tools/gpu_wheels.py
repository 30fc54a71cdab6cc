"""The packages that `tools/gpu_check.py` needs beside torch, transformers, triton and numba, as wheels in a folder.

    python tools/gpu_wheels.py .wheels        # where there is a package index; `make gpu-wheels`

On the machine with the GPU only those that are missing there are installed, into a folder of their own.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 25_000_000

GROUPS: tuple[dict[str, str], ...] = (
    {
        "pydantic": "pydantic",
        "pydantic-core": "pydantic_core",
        "annotated-types": "annotated_types",
        "typing-inspection": "typing_inspection",
    },
    {"typer": "typer", "shellingham": "shellingham", "annotated-doc": "annotated_doc", "click": "click"},
    {"rich": "rich", "markdown-it-py": "markdown_it", "mdurl": "mdurl", "pygments": "pygments"},
    {"pyyaml": "yaml"},
    {"gguf": "gguf"},
    {"accelerate": "accelerate", "psutil": "psutil"},
    {"pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig"},
    {"hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers"},
)
"""Names of packages and of their modules. Those of one group fit each other: all are installed, or none."""


def missing() -> list[str]:
    """Packages of every group of which a module cannot be imported here."""
    return [
        package
        for group in GROUPS
        if any(importlib.util.find_spec(module) is None for module in group.values())
        for package in group
    ]


def download(folder: Path, constraints: Path) -> None:
    """Fill the folder. Raises SystemExit where the wheels are too many to be carried."""
    packages = [package for group in GROUPS for package in group]
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "-c", str(constraints)]
    subprocess.run([*pip, "--dest", str(folder), *packages], check=True)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise SystemExit(f"error: {folder} holds {size / 1e6:.1f} MB of wheels, more than {MOST_BYTES / 1e6:.0f}")
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 1e6:.1f} MB")


def install(folder: Path, target: Path) -> None:
    """Install into `target` what this machine lacks. Raises SystemExit where the folder does not hold it."""
    packages = missing()
    if not packages:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    command = [*pip, "--find-links", str(folder), "--target", str(target), *packages]
    if subprocess.run(command, capture_output=True, text=True, timeout=60).returncode != 0:
        names = ", ".join(packages)
        raise SystemExit(f"error: not installed here and not in {folder}: {names}; run `make gpu-wheels` elsewhere")


if __name__ == "__main__":
    download(Path(sys.argv[1]), Path(__file__).parents[1] / "constraints.txt")
