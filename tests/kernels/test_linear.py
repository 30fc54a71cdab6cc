"""AdditiveLinear: gradients, what it stores, and which values it computes with."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from aqlm_kernels import AdditiveLinear, AdditiveMatrix, KernelError, from_checkpoint, linear, ops

OUT, IN = 70, 48
SCHEMES = [(2, 256, 8), (1, 4096, 16)]

BOUND = 3e-4  # relative RMS of a product by tables in 16 bits


def random_matrix(num_codebooks=2, codebook_size=256, group_size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, codebook_size, (OUT, IN // group_size, num_codebooks), generator=draw)
    codebooks = torch.randn(num_codebooks, codebook_size, group_size, generator=draw)
    return AdditiveMatrix(codes, codebooks, 0.5 + torch.rand(OUT, generator=draw))


def random_rows(rows, seed=1):
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def relative_rms(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients_of(layer, x, dy):
    """y and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, layer.codebooks.grad, layer.scales.grad, layer.bias.grad]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradcheck_in_float64(scheme):
    matrix = random_matrix(scheme[0], 4, scheme[2])
    small = AdditiveMatrix(matrix.codes[:3], matrix.codebooks.double(), matrix.scales[:3].double())
    layer = AdditiveLinear(small, torch.zeros(3).double())
    parameters = dict(layer.named_parameters())

    def product(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(product, (random_rows(2).double().requires_grad_(), *parameters.values()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_compiled_gradients_agree_with_float64(scheme, dtype, bound):
    matrix, bias = random_matrix(*scheme), torch.randn(OUT)
    x, dy = random_rows(40).to(dtype), torch.randn(40, OUT).to(dtype)
    exact = AdditiveLinear(matrix, bias).double()
    found = gradients_of(AdditiveLinear(matrix, bias), x, dy)
    for tensor, expected in zip(found, gradients_of(exact, x.double(), dy.double()), strict=True):
        assert relative_rms(tensor, expected) < bound


def test_autocast_computes_in_its_type_and_leaves_gradients_in_float32():
    layer, x, dy = AdditiveLinear(random_matrix(), torch.randn(OUT)), random_rows(40), torch.randn(40, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, *of_parameters = gradients_of(layer, x, dy)
        few = layer(x[:1].detach())
    assert y.dtype == few.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in (dx, *of_parameters)} == {torch.float32}
    explicit = AdditiveLinear(random_matrix(), layer.bias)
    assert torch.equal(y, explicit(x.bfloat16()))


def test_autocast_around_backward_does_not_coarsen_float32():
    layers = [AdditiveLinear(random_matrix()) for _ in range(2)]
    for layer, autocast in zip(layers, (False, True), strict=True):
        y = layer(random_rows(40)).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.backward()
    assert torch.equal(layers[0].codebooks.grad, layers[1].codebooks.grad)


@pytest.mark.parametrize("frozen", ["codebooks", "scales"])
def test_a_frozen_parameter_gets_no_gradient(frozen):
    layer = AdditiveLinear(random_matrix())
    getattr(layer, frozen).requires_grad_(False)
    layer(random_rows(1)).sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is None} == {frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, linear.FEW_ROWS["cpu"], linear.FEW_ROWS["cpu"] + 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_and_many_rows_give_the_same_result(scheme, rows, dtype):
    matrix, bias = random_matrix(*scheme), torch.randn(OUT)
    x = random_rows(rows).to(dtype)
    with torch.no_grad():
        y = AdditiveLinear(matrix, bias)(x[None])
    assert y.dtype == dtype and y.shape == (1, rows, OUT)
    expected = F.linear(x.double(), matrix.dequantize(torch.float64), bias.double())
    assert (y[0].double() - expected).norm() <= max(BOUND, 10 * torch.finfo(dtype).eps) * expected.norm()


def test_a_forward_changes_nothing_stored():
    layer = AdditiveLinear(random_matrix(), torch.randn(OUT)).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(random_rows(1)), layer(random_rows(20))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def halve_in_place(layer):
    with torch.no_grad():
        layer.scales.mul_(0.5)


def halve_data(layer):
    layer.codebooks.data = layer.codebooks.data * 0.5


def replace_codes(layer):
    layer.codes = layer.codes.flip(0)


def load_another(layer):
    layer.load_state_dict(AdditiveLinear(random_matrix(seed=5)).state_dict())


def assign_another(layer):
    layer.load_state_dict(AdditiveLinear(random_matrix(seed=5)).state_dict(), assign=True)


@pytest.mark.parametrize("change", [halve_in_place, halve_data, replace_codes, load_another, assign_another])
def test_decoding_sees_a_changed_parameter(change):
    layer = AdditiveLinear(random_matrix()).requires_grad_(False)
    x = random_rows(1)
    before = layer(x)
    change(layer)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x), F.linear(x, layer.matrix().dequantize()), rtol=0, atol=0.02)


def test_the_packed_matrix_is_made_once():
    layer = AdditiveLinear(random_matrix())
    assert layer.packed() is layer.packed()
    other = copy.deepcopy(layer)
    assert other.packed() is not layer.packed()
    assert other.packed() is other.packed() and layer.packed() is layer.packed()  # neither drives the other out


def test_the_cache_of_a_layer_is_freed_with_it():
    layer = AdditiveLinear(random_matrix())
    packed = weakref.ref(layer.packed())
    del layer
    gc.collect()
    assert packed() is None


def test_a_layer_made_in_inference_mode_serves():
    with torch.inference_mode():
        layer = AdditiveLinear(random_matrix())
        x = random_rows(1)
        torch.testing.assert_close(layer(x), F.linear(x, layer.matrix().dequantize()), rtol=0, atol=0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_state_dict_is_the_checkpoints_layout(scheme):
    num_codebooks, codebook_size, group_size = scheme
    stored = AdditiveLinear(random_matrix(*scheme), torch.zeros(OUT)).state_dict()
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in stored.items()} == {
        "codes": (torch.int8 if codebook_size <= 256 else torch.int16, [OUT, IN // group_size, num_codebooks]),
        "codebooks": (torch.float16, [num_codebooks, codebook_size, 1, group_size]),
        "scales": (torch.float16, [OUT, 1, 1, 1]),
        "bias": (torch.float16, [OUT]),
    }


def empty_like(layer, device, bias=True):
    matrix = layer.matrix()
    return AdditiveLinear.empty(
        matrix.out_features,
        matrix.in_features,
        num_codebooks=matrix.num_codebooks,
        codebook_bits=matrix.codebook_bits,
        group_size=matrix.group_size,
        bias=bias,
        device=device,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_comes_back_into_an_empty_layer(scheme, device):
    layer = AdditiveLinear(random_matrix(*scheme), torch.randn(OUT))
    stored = torch.nn.Sequential(layer).state_dict()
    empty = torch.nn.Sequential(empty_like(layer, device))
    assert empty.state_dict().keys() == stored.keys()
    empty.load_state_dict(stored, assign=device == "meta")
    assert torch.equal(empty[0].codes, layer.codes)
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.float32}
    assert all(torch.equal(empty.state_dict()[name], tensor) for name, tensor in stored.items())


def test_shapes_flow_on_the_meta_device():
    layer = empty_like(AdditiveLinear(random_matrix()), "meta")
    assert layer(torch.zeros(2, 3, IN, device="meta")).shape == (2, 3, OUT)


def test_a_state_dict_that_does_not_fit_is_refused():
    layer = AdditiveLinear(random_matrix(), torch.randn(OUT))
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        layer.load_state_dict(AdditiveLinear(random_matrix(3), torch.zeros(OUT)).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        layer.load_state_dict(AdditiveLinear(random_matrix()).state_dict())


def test_a_layer_is_made_from_a_checkpoints_tensors():
    stored = AdditiveLinear(random_matrix()).state_dict()
    assert torch.equal(AdditiveLinear(from_checkpoint(stored)).codes, random_matrix().codes)


@pytest.mark.parametrize("rows", [1, 20])
def test_an_input_of_another_width_is_refused(rows):
    with pytest.raises(KernelError, match="its last axis must be the layer's 48 inputs"):
        AdditiveLinear(random_matrix())(torch.ones(rows, 40))


def test_a_bias_of_another_length_is_refused():
    with pytest.raises(KernelError, match="bias is \\[3\\], the matrix has 70 outputs"):
        AdditiveLinear(random_matrix(), torch.zeros(3))


def test_the_scheme_shows_in_the_printed_module():
    assert "in_features=48, out_features=70, scheme=2x8g8, bias=False" in repr(AdditiveLinear(random_matrix()))


# ------------------------------------------------------------------------------------------------- operators of torch


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_compiled_graph_holds_the_whole_matmul(scheme, frozen):
    layers = torch.nn.Sequential(AdditiveLinear(random_matrix(*scheme), torch.randn(OUT)), torch.nn.ReLU())
    layers.requires_grad_(not frozen)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for rows in 1, 20:
        x = random_rows(rows).requires_grad_(not frozen)
        y = compiled(x)
        assert torch.equal(y, layers(x))
        if not frozen:
            of = [x, *layers.parameters()]
            dy = torch.randn_like(y)
            for found, expected in zip(
                torch.autograd.grad(y, of, dy), torch.autograd.grad(layers(x), of, dy), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["decoding_product", "product", "input_gradient", "weight_gradients"])
def test_every_operator_runs_on_the_cpu_and_on_a_gpu(name):
    for kind in "CPU", "CUDA":
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aqlm::{name}", kind)


def test_the_operators_keep_torch_s_rules():
    layer = AdditiveLinear(random_matrix())
    x = random_rows(3).requires_grad_()
    parts = layer.codes, layer.codebooks, layer.scales
    torch.library.opcheck(ops.product, (x, *parts))
    detached = [part.detach() for part in parts]
    torch.library.opcheck(ops.decoding_product, (x.detach(), *detached, layer._key, "cpu-lut"))
