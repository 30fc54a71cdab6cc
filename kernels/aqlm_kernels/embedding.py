"""CompressedEmbedding: nn.Embedding whose table is a compressed matrix: only the rows looked up are dequantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.matrix import QuantizedLayer


class CompressedEmbedding(nn.Module):
    """Rows of W `[vocabulary, d]` by token id, differentiable in the learnable tensors of W.

    `table` is the quantized layer of W. In a tied model the lm_head is this same module, so that each parameter exists
    once. Embeddings have the type `dtype`, whatever the type of the parameters; `.to(dtype)` changes it.
    """

    table: Any  # nn.Module and QuantizedLayer, with rows(index, dtype)

    def __init__(
        self,
        table: nn.Module,
        padding_idx: int | None = None,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`scale` multiplies every embedding, as some models do; the row `padding_idx` gets no gradients."""
        super().__init__()
        if not (isinstance(table, QuantizedLayer) and hasattr(table, "rows")):
            raise KernelError(f"a {type(table).__name__} has no compressed rows to look up; quantize the table first")
        self.table = table
        self.padding_idx = padding_idx
        self.scale = scale
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        size: int = self.table.out_features
        return size

    @property
    def embedding_dim(self) -> int:
        width: int = self.table.in_features
        return width

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., d]
        if not ids.numel():  # no kind of matrix is empty
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        rows: Tensor = self.table.rows(ids.flatten(), self.dtype)
        embeddings = rows.view(*ids.shape, self.embedding_dim)
        if self.padding_idx is not None:
            embeddings = torch.where((ids == self.padding_idx)[..., None], embeddings.detach(), embeddings)
        return embeddings if self.scale == 1 else embeddings * torch.tensor(self.scale, dtype=self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a compressed embedding has no weight to look at or to train row by row; `.matrix().dequantize()` "
                "gives its values, and adapters of linear layers learn beside it"
            )
        return super().__getattr__(name)

    def matrix(self) -> Any:
        """The matrix of the table with its present values."""
        return self.table.matrix()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the table, by name."""
        parameters: dict[str, nn.Parameter] = self.table.trainable()
        return parameters

    def balance(self) -> None:
        """Bring the parameters of the table into the range of float16, in place and without a change of W."""
        self.table.balance()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedEmbedding:
        """A change of the type of all parameters, by `.to` or `.half`, is one of the embeddings, too."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """The factor by which an embedding multiplies its rows, 1 for most; None where it computes something else."""
    if embedding.max_norm is not None:
        return None
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(scale, (int, float)):
        return None
    small: Any = copy.copy(embedding)
    small.num_embeddings, small.embedding_dim, small.padding_idx = 2, 2, None
    with torch.device("cpu"):  # transformers makes networks on the meta device
        weight, factor = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor(scale, dtype=torch.float32)
        small._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        small._buffers = dict.fromkeys(embedding._buffers, factor)
        ids = torch.tensor([1, 0])
        return float(scale) if torch.equal(small(ids), F.embedding(ids, weight) * factor) else None
