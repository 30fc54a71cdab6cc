"""The Triton products without a GPU: numbers under the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqlm_kernels import pack, reference

from .conftest import CASES

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="runs in a process that interprets Triton")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="runs where Triton compiles")

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


@pytest.fixture(params=CASES, ids=str)
def problem(request):
    """x, the matrix, and the functions, on the CPU."""
    from aqlm_kernels.gpu import products

    return request.param, products


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_of_integers_equal_the_reference(problem, dtype):
    case, products = problem
    x, matrix = case.integers()
    packed = pack(matrix)
    # The interpreter multiplies matrices of bfloat16 as if they were integers; one row is summed otherwise.
    for rows in (x[:1],) if dtype == torch.bfloat16 else (x, x[:1]):
        expected = reference.matmul(rows.to(dtype), packed)
        assert torch.equal(products.multiply(rows.to(dtype), packed), expected)


@interpreted_only
def test_products_of_reals_are_near_float64(problem):
    case, products = problem
    x, matrix = case.reals()
    if case.rows == 0:
        pytest.skip("no numbers to compare")
    packed = pack(matrix)
    for rows in (x, x[:1]):
        exact = reference.matmul(rows.double(), packed)
        assert (products.multiply(rows, packed) - exact).norm() < 1e-6 * exact.norm()


@compiled_only
def test_the_numbers_are_right_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d{2} passed", done.stdout)


# ------------------------------------------------------------------------------------------------------- what compiles


def compiled(kernel, target, codebooks=(2, 256, 8), dtype="fp16"):
    """The object that Triton makes of a kernel for a GPU that need not be here."""
    from triton.compiler import ASTSource

    from aqlm_kernels.gpu import products

    num_codebooks, codebook_size, group_size = codebooks
    codes = "*u8" if codebook_size <= 256 else "*u16"
    at_once = products.groups_at_once(group_size)
    constants = {"M": num_codebooks, "K": codebook_size, "G": group_size, "TILE": 64, "GROUPS": at_once}
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "codes": codes}
    types |= {"codebooks": "*fp32", "scales": "*fp32", "shares": "*fp32"}
    if "ROWS" in kernel.arg_names:
        constants["ROWS"] = 16
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # As Triton sees them at a launch: what torch allocates begins at a multiple of 16 bytes.
    aligned = [number for number, name in enumerate(kernel.arg_names) if name in types]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=products.LAUNCH)


def nvidia_resources(program, tmp_path: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack (spills) and shared memory, as the object says."""
    import triton.backends.nvidia as nvidia

    path = tmp_path / "kernel.cubin"
    path.write_bytes(program.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    found = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK", "LOCAL")}


KERNELS = ["decode", "multiply"]
SCHEMES = [(1, 256, 8), (2, 256, 8), (4, 256, 8), (3, 256, 16), (2, 256, 4), (1, 4096, 8), (1, 65536, 8)]
NVIDIA = [80, 90, 100]


def every_scheme(kinds):
    """All schemes in the long tests, one of each kind of kernel and target in the short ones."""
    for kind in kinds:
        for scheme in SCHEMES:
            long = scheme != (2, 256, 8)
            yield pytest.param(*kind, scheme, marks=[pytest.mark.soak] if long else [])


@compiled_only
@pytest.mark.parametrize(
    ("name", "capability", "scheme"),
    list(every_scheme((name, capability) for name in KERNELS for capability in NVIDIA)),
)
def test_nothing_is_spilled_on_nvidia(name, capability, scheme, tmp_path):
    from triton.backends.compiler import GPUTarget

    from aqlm_kernels.gpu import kernels

    program = compiled(getattr(kernels, name), GPUTarget("cuda", capability, 32), scheme)
    used = nvidia_resources(program, tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert 0 < used["REG"] <= 255
    assert program.metadata.shared <= 48 * 1024


@compiled_only
@pytest.mark.parametrize(("name", "scheme"), list(every_scheme((name,) for name in KERNELS)))
def test_nothing_is_spilled_on_amd(name, scheme):
    from triton.backends.compiler import GPUTarget

    from aqlm_kernels.gpu import kernels

    program = compiled(getattr(kernels, name), GPUTarget("hip", "gfx942", 64), scheme)
    text = program.asm["amdgcn"]
    spilled = [int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)]
    assert len(spilled) >= 2 and not any(spilled)
    assert program.metadata.shared <= 64 * 1024
