"""`aqlm doctor`: what this machine has, which backends it can use, and why it cannot use the others."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
from llvmlite import binding
from rich.table import Table

from aqlm_cli.formatting import counted, facts
from aqlm_cli.records import Record
from aqlm_kernels import BACKENDS, smallest

PACKAGES = ("aqlm-cli", "torch", "transformers", "numba", "triton", "aqlm")

# What decides how fast kernels and products are.
FEATURES = ("avx2", "avx512_f", "avx512_vbmi", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve")

# One scheme with codebooks small enough for tables, one without.
SCHEMES = {"2x8g8": (2, 256, 8), "1x16g8": (1, 65536, 8)}


@dataclass(frozen=True)
class BackendReport:
    """A backend and a scheme on this machine; `refusal` is the reason why it cannot multiply by it, or None."""

    name: str
    scheme: str
    device: str
    refusal: str | None


@dataclass(frozen=True)
class MachineReport(Record):
    """Processor, accelerators and packages of this machine. `versions` of packages that are not installed are None."""

    processor: str
    features: tuple[str, ...]
    cores: int
    threads: int
    accelerators: tuple[str, ...]
    versions: Mapping[str, str | None]
    backends: tuple[BackendReport, ...]

    def table(self) -> Table:
        return facts(
            "this machine",
            [
                ("processor", f"{self.processor}, {counted(self.cores, 'core')}"),
                ("threads in use", str(self.threads)),
                ("features", ", ".join(self.features) or "none that matter here"),
                ("accelerators", ", ".join(self.accelerators) or "none"),
                *((name, version or "not installed") for name, version in self.versions.items()),
                *(
                    (f"backend {row.name}", f"{row.scheme} on {row.device}: {row.refusal or 'ready'}")
                    for row in self.backends
                ),
            ],
        )


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
