"""The mapping from tensors in a model's files to parameters of its network; no weight is read for it.

Names differ: a prefix is added or dropped (`h.0.` and `transformer.h.0.`), modules have other names than in the files,
and some tensors are split, joined or transposed. transformers has the rules for every model type. The functions with
which `from_pretrained` renames and converts are called here with names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.source import ModelSource, tensor_index
from aqlm_cli.runs.files import TensorLayout

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter  # takes seconds to import

CODE_TENSORS = ("codes", "codebooks", "scales")
"""Tensors of a quantized layer in an AQLM checkpoint, in place of its weight."""


@dataclass(frozen=True)
class Placement:
    """Tensors `stored` in the files, which together become these `parameters` (or buffers) of the network.

    Most map one to one. `convert` computes the parameters if more than the name changes; its argument reads a stored
    tensor. No parameters: the network does not use the tensor, and transformers ignores it.

    Where the files have tensors of single experts and the network one parameter of all, `expert_files` says how the
    parameter is written as they have it; it gives None for every other conversion.
    """

    stored: tuple[str, ...]
    parameters: Mapping[str, TensorLayout]
    convert: Callable[[Callable[[str], Tensor]], dict[str, Tensor]] | None = None
    expert_files: Callable[[], ExpertFiles | None] = lambda: None


@dataclass(frozen=True)
class ExpertFiles:
    """The tensors of single experts that a parameter `[experts, ...]` is made of: the number of each one's expert.

    `split` gives the stored tensor of a name from the part `[1, ...]` of its expert.
    """

    numbers: Mapping[str, int]
    split: Callable[[str, Tensor], Tensor]


def placements(network: transformers.PreTrainedModel, stored: Mapping[str, TensorLayout]) -> list[Placement]:
    """Placement of every tensor of the files, each once, in a network without weights."""
    plain: list[Placement] = []
    groups: dict[str, _Group] = {}
    for name, key, converter, pattern in _renamed(network, stored, network.state_dict()):
        if key is None:
            plain.append(Placement((name,), {}))
        elif converter is None:
            plain.append(Placement((name,), {key: stored[name]}))
        else:
            groups.setdefault(key, _Group(network, key, converter)).patterns[name] = pattern
    return plain + [group.placement(stored) for group in groups.values()]


def stored_parameters(network: transformers.PreTrainedModel, source: ModelSource) -> set[str]:
    """Parameters that the model's files store; a tied head is one of them if they store it by its own name."""
    stored = {name: tensor.layout for name, tensor in tensor_index(source.directory).items()}
    return {name for placement in placements(network, stored) for name in placement.parameters}


def places_of_codes(network: transformers.PreTrainedModel, names: Collection[str]) -> dict[str, dict[str, str]]:
    """Names that are tensors of a quantized layer: path of the module -> last part -> name."""
    places: dict[str, dict[str, str]] = {}
    bases = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    parts = [f"{base}.{last}" for base in bases for last in (*CODE_TENSORS, "bias")]
    listed = _with_codes(network)
    for name, key, converter, _ in _renamed(network, [part for part in parts if part in names], listed):
        # A layer that the network lacks keeps its name, and the caller reports it.
        path, _, last = (name if key is None or converter is not None else key).rpartition(".")
        places.setdefault(path, {})[last] = name
    return places


def names_of_codes(network: transformers.PreTrainedModel, weights: Mapping[str, str]) -> dict[str, str]:
    """Prefix of the names of a layer's codes in a checkpoint, by the path of its module.

    `weights` are the names of these layers' weights in the files. Their prefix is used if transformers maps it to the
    module, otherwise the path itself.
    """
    bases = {path: name.removesuffix(".weight") for path, name in weights.items()}
    names = [f"{base}.{last}" for base in bases.values() for last in CODE_TENSORS]
    key_by_name = {
        name: key for name, key, converter, _ in _renamed(network, names, _with_codes(network)) if not converter
    }
    return {
        path: base if all(key_by_name.get(f"{base}.{last}") == f"{path}.{last}" for last in CODE_TENSORS) else path
        for path, base in bases.items()
    }


@dataclass
class _Group:
    """Tensors that one converter takes together, collected name by name."""

    network: transformers.PreTrainedModel
    key: str
    converter: WeightConverter
    patterns: dict[str, str] = field(default_factory=dict)  # pattern of the converter, by name of the stored tensor

    def placement(self, stored: Mapping[str, TensorLayout]) -> Placement:
        made = self.convert(lambda name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta"))
        layouts = {key: TensorLayout(tensor.dtype, tuple(tensor.shape)) for key, tensor in made.items()}
        return Placement(tuple(self.patterns), layouts, self.convert, lambda: self._expert_files(layouts, stored))

    def _expert_files(
        self, layouts: Mapping[str, TensorLayout], stored: Mapping[str, TensorLayout]
    ) -> ExpertFiles | None:
        """None unless transformers' own inverse gives the stored tensors of an expert back."""
        names: dict[str, list[str]] = {}  # by pattern, in the order of the experts
        for name, pattern in self.patterns.items():
            names.setdefault(pattern, []).append(name)
        numbers = {name: number for group in names.values() for number, name in enumerate(group)}
        count = next(iter(layouts.values())).shape[0]
        if len(layouts) != 1 or any("*" not in pattern or len(group) != count for pattern, group in names.items()):
            return None

        def split(name: str, part: Tensor) -> Tensor:
            return self._reverted(part)[self.patterns[name]]

        draw = torch.Generator().manual_seed(0)
        first = {group[0]: torch.randn(stored[group[0]].shape, generator=draw) for group in names.values()}
        try:
            (part,) = self.convert(first.__getitem__, first).values()
            same = all(torch.equal(split(name, part), tensor) for name, tensor in first.items())
        except Exception:  # conversions without an inverse, or of all experts together, raise errors of any kind
            return None
        return ExpertFiles(numbers, split) if same else None

    def _reverted(self, part: Tensor) -> dict[str, Tensor]:
        """The stored tensors of one expert by pattern, from its part `[1, ...]` of the parameter."""
        converter: Any = deepcopy(self.converter).reverse_transform()
        key, pattern = converter.rename_source_key(self.key)
        converter.add_tensor(key, self.key, pattern, part)
        made = converter.convert(key, model=self.network, config=self.network.config)
        found: dict[str, Tensor] = {}
        for pattern in set(self.patterns.values()):
            (name,) = (name for name in made if pattern.replace("*", "0") in name)
            found[pattern] = made[name][0] if isinstance(made[name], list) else made[name]
        return found

    def convert(self, read: Callable[[str], Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The parameters, made of all stored tensors, or of those in `names`."""
        converter: Any = deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            if names is not None and name not in names:
                continue
            converter.add_tensor(self.key, name, pattern, lambda name=name: read(name))
        try:
            made = converter.convert(self.key, model=self.network, config=self.network.config)
        except Exception as error:  # shapes that cannot be split or joined raise errors of any kind
            line = shortened(str(error).partition("\n")[0], 200)
            name = next(iter(self.patterns))
            raise ModelError(f"{name} in the model's files cannot be converted to {self.key} ({line})") from error
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _renamed(
    network: transformers.PreTrainedModel, names: Collection[str], listed: Mapping[str, Tensor]
) -> Iterator[tuple[str, str | None, WeightConverter | None, str]]:
    """Names of a file in transformers' order, each with its key in the network, its converter and the pattern of it.

    `listed` are the network's tensors by key; the key is None for a name that maps to none of them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(network)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, tensors = network.base_model_prefix, dict(listed)
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
        if key not in listed and name in listed:  # as from_pretrained does: a name that fits stays
            key, pattern = rename_source_key(name, [], [], prefix, tensors)
        converter = None if pattern is None else by_pattern[pattern]
        yield name, key if key in listed else None, converter, pattern or name


def _with_codes(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network by key, as if every linear layer were quantized."""
    nothing = torch.empty(0, device="meta")
    linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return {**network.state_dict(), **{f"{path}.{last}": nothing for path in linears for last in CODE_TENSORS}}
