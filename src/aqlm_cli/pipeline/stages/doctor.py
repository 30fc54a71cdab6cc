"""`aqlm doctor`: what this machine has, which backends it can use, and why it cannot use the others."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
from llvmlite import binding

from aqlm_cli.records import BackendReport, MachineReport
from aqlm_kernels import BACKENDS, smallest

PACKAGES = ("aqlm-cli", "torch", "transformers", "numba", "triton", "aqlm")

# What decides how fast kernels and products are.
FEATURES = ("avx2", "avx512_f", "avx512_vbmi", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve")

# One scheme with codebooks small enough for tables, one without.
SCHEMES = {"2x8g8": (2, 256, 8), "1x16g8": (1, 65536, 8)}


def doctor() -> MachineReport:
    accelerators = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(len(accelerators)))]
    present = torch.cpu.get_capabilities()
    return MachineReport(
        processor=f"{platform.machine()} {binding.get_host_cpu_name()}",
        features=tuple(name for name in FEATURES if present.get(name)),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerators=accelerators,
        versions={package: _version(package) for package in PACKAGES},
        backends=tuple(
            BackendReport(backend.name, scheme, str(device), backend.refuses(smallest(*shape), device))
            for backend in BACKENDS
            for scheme, shape in SCHEMES.items()
            for device in devices
        ),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
