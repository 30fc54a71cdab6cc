"""The Triton products without a GPU: numbers under the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import CASES

from aqlm_kernels import PackedMatrix, reference
from aqlm_kernels.matrices import additive

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="runs in a process that interprets Triton")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="runs where Triton compiles")

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


@pytest.fixture(params=CASES, ids=str)
def problem(request):
    """The case, and the functions on the CPU."""
    from aqlm_kernels.gpu import matmul

    return request.param, matmul


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matmul_of_integers_equals_the_reference(problem, dtype):
    case, matmul = problem
    x, matrix = case.integers()
    packed = PackedMatrix(matrix)
    # The interpreter multiplies matrices of bfloat16 as if they were integers; one row is summed otherwise.
    for rows in (x[:1],) if dtype == torch.bfloat16 else (x, x[:1]):
        expected = reference.matmul(rows.to(dtype), packed)
        assert torch.equal(matmul.multiply(rows.to(dtype), packed), expected)


@interpreted_only
def test_matmul_of_reals_is_near_float64(problem):
    case, matmul = problem
    x, matrix = case.reals()
    if case.rows == 0:
        pytest.skip("no numbers to compare")
    packed = PackedMatrix(matrix)
    for rows in (x, x[:1]):
        exact = reference.matmul(rows.double(), packed)
        assert (matmul.multiply(rows, packed) - exact).norm() < 1e-6 * exact.norm()


@interpreted_only
def test_many_rows_and_their_gradients_equal_float64_on_integers(problem):
    case, matmul = problem
    x, matrix = case.integers()
    x = x.repeat(20, 1)  # up to 160 rows, which are several programs
    draw = torch.Generator().manual_seed(2)
    dy = torch.randint(-3, 4, (len(x), case.out_features), generator=draw).float()
    parts = matrix.codes, matrix.codebooks, matrix.scales
    weight = matrix.dequantize(torch.float64)
    assert torch.equal(matmul.gemm(x, *parts), (x.double() @ weight.T).float())
    assert torch.equal(matmul.input_gradient(dy, *parts), (dy.double() @ weight).float())
    codebooks, scales = matrix.codebooks.double().requires_grad_(), matrix.scales.double().requires_grad_()
    additive.dequantize(matrix.codes, codebooks, scales, torch.float64).backward(dy.double().T @ x.double())
    of_codebooks, of_scales = matmul.weight_gradients(dy, x, *parts)
    assert torch.equal(of_codebooks.double(), codebooks.grad)
    assert torch.equal(of_scales.double(), scales.grad)


@interpreted_only
def test_gradients_of_reals_are_near_float64(problem):
    case, matmul = problem
    x, matrix = case.reals()
    if case.rows == 0:
        pytest.skip("no numbers to compare")
    draw = torch.Generator().manual_seed(2)
    dy = torch.randn(2, case.rows, case.out_features, generator=draw)
    x = x.expand(2, -1, -1)
    parts = matrix.codes, matrix.codebooks, matrix.scales
    codebooks, scales = matrix.codebooks.double().requires_grad_(), matrix.scales.double().requires_grad_()
    weight = additive.dequantize(matrix.codes, codebooks, scales, torch.float64)
    weight.backward(dy.double().flatten(0, 1).T @ x.double().flatten(0, 1))
    for found, exact in [
        (matmul.gemm(x, *parts), x.double() @ weight.T),
        (matmul.input_gradient(dy, *parts), dy.double() @ weight),
        *zip(matmul.weight_gradients(dy, x, *parts), (codebooks.grad, scales.grad), strict=True),
    ]:
        assert found.shape == exact.shape
        assert (found - exact).norm() < 1e-6 * exact.norm()


LONG = [("dx, 512 rows", "3x8g8"), ("dC and ds, 512 rows", "1x16g8"), ("y, 512 rows", "1x8g8")]


@interpreted_only
@pytest.mark.parametrize(
    ("product", "scheme"),
    [("y, 1 row", "2x8g8"), ("y, 16 rows", "2x8g8"), *(pytest.param(*one, marks=pytest.mark.soak) for one in LONG)],
)
def test_the_documented_bytes_are_those_that_move(product, scheme):
    from helpers.traffic import line, measured

    documented = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text().splitlines()
    assert line(measured(product, scheme)) in documented


@pytest.mark.slow
@compiled_only
def test_the_numbers_are_right_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d{2} passed", done.stdout)


# ------------------------------------------------------------------------------------------------------- what compiles


def compiled(kernel, target, codebooks, cut, dtype="fp16"):
    """The object that Triton makes of a kernel for a GPU that need not be here."""
    from triton.compiler import ASTSource

    from aqlm_kernels.gpu import kernels, matmul

    kernel, cut = getattr(kernels, kernel), getattr(matmul, cut)
    options = matmul.options(codebooks, cut)
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(("x", "y", "dx", "dy"), f"*{dtype}") | {"codes": "*u8" if codebooks[1] <= 256 else "*u16"}
    types |= dict.fromkeys(("codebooks", "scales", "shares", "codebook_gradient"), "*fp32")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    # As Triton sees them at a launch: a step of 1 is a constant, what torch allocates begins at a multiple of 16 bytes.
    options["lane_step" if cut in (matmul.ONE_ROW, matmul.FEW_ROWS) else "codebook_step"] = 1
    signature |= dict.fromkeys(options, "constexpr")
    aligned = [number for number, name in enumerate(kernel.arg_names) if name in types]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=attributes)
    return triton.compile(source, target=target, options=settings)


def nvidia_resources(program, tmp_path: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack (spills) and shared memory, as the object says."""
    import triton.backends.nvidia as nvidia

    path = tmp_path / "kernel.cubin"
    path.write_bytes(program.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    found = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK", "LOCAL")}


KERNELS = [
    ("decode", "ONE_ROW"),
    ("multiply", "FEW_ROWS"),
    ("multiply", "MANY_ROWS"),
    ("multiply_transposed", "TRANSPOSED"),
    ("weight_gradient", "GRADIENT"),
]
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
    ("kernel", "cut", "capability", "scheme"),
    list(every_scheme((*kernel, capability) for kernel in KERNELS for capability in NVIDIA)),
)
def test_nothing_is_spilled_on_nvidia(kernel, cut, capability, scheme, tmp_path):
    from triton.backends.compiler import GPUTarget

    program = compiled(kernel, GPUTarget("cuda", capability, 32), scheme, cut)
    used = nvidia_resources(program, tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert 0 < used["REG"] <= 255
    assert program.metadata.shared <= 25_000


@compiled_only
@pytest.mark.parametrize(("kernel", "cut", "scheme"), list(every_scheme(KERNELS)))
def test_nothing_is_spilled_on_amd(kernel, cut, scheme):
    from triton.backends.compiler import GPUTarget

    program = compiled(kernel, GPUTarget("hip", "gfx942", 64), scheme, cut)
    text = program.asm["amdgcn"]
    spilled = [int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)]
    assert len(spilled) >= 2 and not any(spilled)
    assert program.metadata.shared <= 25_000
