"""EvaluatedModel: everything that an evaluation may ask of a model, which lies on the disk or is already in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aqlm_cli import models
from aqlm_cli.errors import ModelError
from aqlm_cli.models import Decoding, ModelSource
from aqlm_cli.models.positions import stated_length
from aqlm_cli.models.tokenizer import Tokenizer
from aqlm_cli.quantization.student import names_in_files
from aqlm_cli.spec.evaluate import Head
from aqlm_kernels import quantized_layers


@dataclass(frozen=True)
class Size:
    """Bytes of every tensor of a model by name, a quantized layer in memory by its path.

    `copies` are names of second copies, which no token reads.
    """

    tensors: Mapping[str, int]
    copies: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        return sum(self.tensors.values())

    @property
    def read(self) -> dict[str, int]:
        """All tensors but the copies."""
        return {name: size for name, size in self.tensors.items() if name not in self.copies}


class EvaluatedModel(Protocol):
    @property
    def name(self) -> str:
        """The name in reports."""
        ...

    @property
    def short_name(self) -> str:
        """The name in progress bars."""
        ...

    @property
    def identity(self) -> str:
        """Differs between two models that may compute something else."""
        ...

    @property
    def device(self) -> str | torch.device:
        """The device of the evaluation."""
        ...

    @property
    def is_quantized(self) -> bool:
        """True where any layer computes with codes."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        ...

    def text_tokenizer(self) -> Tokenizer:
        """A tokenizer for one prompt, which may be faster to load."""
        ...

    def network(self, dtype: torch.dtype) -> nn.Module:
        """The network in this type, on the device of the evaluation."""
        ...

    def decoding(self, capacity: int, backend: str | None, head: Head) -> Decoding:
        """Decoding of up to `capacity` tokens, by the fastest code that serves."""
        ...

    def end_tokens(self) -> set[int]:
        """Tokens that end a text."""
        ...

    def size(self, network: nn.Module) -> Size:
        """Size of a quantized model, whose `network` is loaded."""
        ...

    def refuse_length(self, tokens: int, lower: str, stated: bool) -> None:
        """ModelError where the model cannot read so many tokens at once; `lower` names the flag to lower.

        With `stated` also where it could, but config.json states a smaller length.
        """
        ...

    def refuse_tokens(self, ids: Tensor) -> None:
        """ModelError where a token has no embedding."""
        ...


@dataclass(frozen=True)
class StoredModel:
    """A model in a directory. Everything is loaded when it is asked for."""

    source: ModelSource
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def short_name(self) -> str:
        return self.source.short_name

    @property
    def identity(self) -> str:
        return self.source.identity

    @property
    def is_quantized(self) -> bool:
        return models.is_quantized(self.source)

    def tokenizer(self) -> Any:
        return models.load_tokenizer(self.source)

    def text_tokenizer(self) -> Tokenizer:
        return models.open_tokenizer(self.source)

    def network(self, dtype: torch.dtype) -> nn.Module:
        return models.load_network(self.source, dtype, self.device)

    def decoding(self, capacity: int, backend: str | None, head: Head) -> Decoding:
        return models.open_decoding(self.source, capacity, backend, head, self.device)

    def end_tokens(self) -> set[int]:
        return models.end_tokens(self.source)

    def size(self, network: nn.Module) -> Size:
        stored = models.tensor_index(self.source.directory)
        names = names_in_files(network, stored).values()
        copies = frozenset(name for same in names for name in same[1:])
        return Size({name: tensor.bytes for name, tensor in stored.items()}, copies)

    def refuse_length(self, tokens: int, lower: str, stated: bool) -> None:
        refuse = models.refuse_longer_than_stated if stated else models.refuse_too_long
        refuse(self.source, tokens, lower)

    def refuse_tokens(self, ids: Tensor) -> None:
        models.refuse_unknown_tokens(self.source, ids)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network of transformers with its tokenizer, from anywhere; it is not changed, and stays on its device."""

    name: str
    loaded: Any
    loaded_tokenizer: Any = None

    @property
    def short_name(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        return f"{self.name} in memory at {id(self.loaded)}"

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.loaded.parameters()).device
        return device

    @property
    def is_quantized(self) -> bool:
        return bool(quantized_layers(self.loaded))

    def tokenizer(self) -> Any:
        if self.loaded_tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer, and the evaluation reads text; give one")
        return self.loaded_tokenizer

    def text_tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self.tokenizer()
        return tokenizer

    def network(self, dtype: torch.dtype) -> nn.Module:
        copied: nn.Module = copy.deepcopy(self.loaded)
        return copied.to(dtype).eval().requires_grad_(False)

    def decoding(self, capacity: int, backend: str | None, head: Head) -> Decoding:
        return models.decoding_of(self.network(torch.float32), capacity, backend, head)

    def end_tokens(self) -> set[int]:
        end = self.loaded.config.eos_token_id
        return {token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)}

    def size(self, network: nn.Module) -> Size:
        return packed_size(network)

    def refuse_length(self, tokens: int, lower: str, stated: bool) -> None:
        length = stated_length(self.loaded.config.to_dict())
        if length is not None and tokens > length[1]:
            raise ModelError(f"{self.name} reads {length[1]} tokens, not {tokens}; lower {lower}")

    def refuse_tokens(self, ids: Tensor) -> None:
        rows = self.loaded.get_input_embeddings().num_embeddings
        if int(ids.max()) >= rows:
            raise ModelError(f"token id {int(ids.max())} is outside vocab_size {rows}: the tokenizer does not match")


def packed_size(network: nn.Module) -> Size:
    """Codes as their schemes count them, and everything else in 16 bits."""
    layers = quantized_layers(network)
    learnt = {id(part) for layer in layers.values() for name, part in layer.trainable().items() if name != "bias"}
    rest = {name: 2 * part.numel() for name, part in network.named_parameters() if id(part) not in learnt}
    return Size({path: layer.matrix().bits() // 8 for path, layer in layers.items()} | rest)
