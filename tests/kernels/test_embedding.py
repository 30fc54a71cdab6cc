"""CompressedEmbedding: rows of its matrix with their gradients, and one table for both duties of a tied model."""

from __future__ import annotations

import pytest
import torch
from helpers.largest import largest_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_kernels import (
    AdditiveMatrix,
    CompressedEmbedding,
    CompressedLinear,
    KernelError,
    Matrix,
    QuantizedLayer,
    UniformMatrix,
    quantized_layers,
)

VOCABULARY, WIDTH = 40, 32


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def additive(rows: int = VOCABULARY) -> AdditiveMatrix:
    codes = torch.randint(256, (rows, WIDTH // 8, 2), generator=draw())
    return AdditiveMatrix(codes, torch.randn(2, 256, 8, generator=draw()), torch.rand(rows, generator=draw()) + 0.5)


def uniform(rows: int = VOCABULARY) -> UniformMatrix:
    levels = torch.randint(8, (rows, WIDTH), generator=draw(), dtype=torch.uint8)
    zeros = torch.randint(8, (rows, WIDTH // 16), generator=draw(), dtype=torch.uint8)
    scales = (torch.rand(rows, WIDTH // 16, generator=draw()) + 0.5).half()
    return UniformMatrix(levels, zeros, scales, torch.tensor(3).to(torch.uint8), torch.tensor(0).to(torch.int16))


MATRICES: dict[str, Matrix] = {"additive": additive(), "uniform": uniform()}
IDS = torch.tensor([[3, 0, 39], [7, 3, 3]])


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_rows_and_gradients_are_those_of_the_dense_table(kind: str, general: bool) -> None:
    matrix = MATRICES[kind]
    table = CompressedLinear(matrix) if general else matrix.module()
    embedding = CompressedEmbedding(table, padding_idx=7)
    slope = torch.randint(-3, 4, (*IDS.shape, WIDTH), generator=draw()).float()
    dense = matrix.from_tensors({**matrix.tensors(), **{n: getattr(table, n) for n in matrix.learnable}}).dequantize()
    wanted = F.embedding(IDS, dense, padding_idx=7)
    found = embedding(IDS)
    assert torch.equal(found, wanted) and found.dtype == torch.float32
    theta = [getattr(table, name) for name in matrix.learnable]
    gradients = torch.autograd.grad(found, theta, slope), torch.autograd.grad(wanted, theta, slope)
    for own, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-6, atol=1e-5)
        assert own.any()


@pytest.mark.parametrize("kind", MATRICES)
def test_type_and_scale_are_those_asked_for(kind: str) -> None:
    embedding = CompressedEmbedding(MATRICES[kind].module(), scale=3.0, dtype=torch.bfloat16)
    wanted = F.embedding(IDS, MATRICES[kind].dequantize(torch.bfloat16)) * torch.tensor(3.0, dtype=torch.bfloat16)
    assert torch.equal(embedding(IDS), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MATRICES)
def test_a_network_in_another_type_has_embeddings_of_that_type(kind: str, dtype: torch.dtype) -> None:
    embedding = CompressedEmbedding(MATRICES[kind].module()).to(dtype)
    wanted = F.embedding(IDS, MATRICES[kind].dequantize(torch.float64))
    found = embedding(IDS)
    assert found.dtype == dtype
    precision = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).eps  # of what is stored
    assert torch.allclose(found.double(), wanted, rtol=0, atol=4 * precision * float(wanted.abs().max()))
    assert embedding.to("cpu")(IDS).dtype == dtype


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("kind", MATRICES)
def test_no_ids_have_no_embeddings(kind: str, shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    wanted = F.embedding(ids, MATRICES[kind].dequantize())
    assert CompressedEmbedding(MATRICES[kind].module())(ids).shape == wanted.shape


@pytest.mark.parametrize("ids", [-1, VOCABULARY])
@pytest.mark.parametrize("kind", MATRICES)
def test_ids_outside_the_vocabulary_are_refused(kind: str, ids: int) -> None:
    with pytest.raises(IndexError):
        CompressedEmbedding(MATRICES[kind].module())(torch.tensor([0, ids]))


@pytest.mark.parametrize("kind", MATRICES)
def test_only_the_rows_looked_up_are_dequantized(kind: str) -> None:
    def largest(rows: int) -> int:
        table = {"additive": additive, "uniform": uniform}[kind](rows).module().requires_grad_(False)
        embedding = CompressedEmbedding(table)
        return largest_tensor(lambda: embedding(IDS))

    assert 0 < largest(2**14) == largest(2**18) < 2**14


class Tied(nn.Module):
    def __init__(self, matrix: Matrix, head_first: bool) -> None:
        super().__init__()
        table = matrix.module()
        if head_first:
            self.lm_head = table
        self.embed_tokens = CompressedEmbedding(table)
        self.lm_head = table

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.embed_tokens(ids))
        return logits


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_a_tied_table_is_one_layer_with_the_gradients_of_both_duties(kind: str, head_first: bool) -> None:
    matrix = MATRICES[kind]
    network = Tied(matrix, head_first)
    assert quantized_layers(network, "model").keys() == {"model.embed_tokens"}
    assert len(list(network.parameters())) == len(matrix.learnable)
    network(IDS).square().mean().backward()
    theta = {n: matrix.tensors()[n].float().clone().requires_grad_() for n in matrix.learnable}
    dense = matrix.from_tensors({**matrix.tensors(), **theta}).dequantize()
    (F.embedding(IDS, dense) @ dense.T).square().mean().backward()
    for name, parameter in network.embed_tokens.trainable().items():
        torch.testing.assert_close(parameter.grad, theta[name].grad, rtol=1e-4, atol=1e-4)


def test_an_untied_head_is_listed_beside_its_embedding() -> None:
    network = nn.ModuleDict({"embed": CompressedEmbedding(uniform().module()), "head": additive().module()})
    assert quantized_layers(network).keys() == {"embed", "head"}


@pytest.mark.parametrize("kind", MATRICES)
def test_an_embedding_is_a_quantized_layer_of_its_table(kind: str) -> None:
    embedding = CompressedEmbedding(MATRICES[kind].module())
    assert isinstance(embedding, QuantizedLayer)
    assert embedding.trainable().keys() == set(MATRICES[kind].learnable)
    with torch.no_grad():
        embedding.table.scales.mul_(2.0**-30)
    before = embedding(IDS)
    embedding.balance()
    assert torch.equal(embedding(IDS), before)
    assert torch.equal(F.embedding(IDS, embedding.matrix().dequantize()), before)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (VOCABULARY, WIDTH)


def test_a_dense_table_is_refused() -> None:
    with pytest.raises(KernelError, match="a Linear has no compressed rows to look up"):
        CompressedEmbedding(nn.Linear(3, 4))
