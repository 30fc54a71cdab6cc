"""What the tensors in a model's files become in its network, as transformers has it; no weight is read for this.

Names differ: a prefix comes or goes (`h.0.` and `transformer.h.0.`), modules are called otherwise than in the files,
and some tensors are cut, joined or turned on the way. transformers knows this of every family. The functions by which
`from_pretrained` renames and converts are asked here about names and shapes alone.
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

CODED = ("codes", "codebooks", "scales")
"""The tensors that an AQLM checkpoint has in the place of a layer's weight."""


@dataclass(frozen=True)
class Placement:
    """Tensors `stored` in the files, which become these `parameters` (or buffers) of the network together.

    Most are one and one. `convert` makes the parameters where it is more than a name that changes, given what reads a
    stored tensor. Without parameters: the network has no place for the tensor, and transformers leaves it alone.
    """

    stored: tuple[str, ...]
    parameters: Mapping[str, TensorLayout]
    convert: Callable[[Callable[[str], Tensor]], dict[str, Tensor]] | None = None


def placements(network: transformers.PreTrainedModel, stored: Mapping[str, TensorLayout]) -> list[Placement]:
    """Every tensor of the files once, for a network without numbers."""
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
    """The parameters for which the model's files have numbers; a tied head is one where they have it by its name."""
    stored = {name: tensor.layout for name, tensor in tensor_index(source.directory).items()}
    return {name for placement in placements(network, stored) for name in placement.parameters}


def places_of_codes(network: transformers.PreTrainedModel, names: Collection[str]) -> dict[str, dict[str, str]]:
    """Which of the names are tensors of a layer with codes: the path of the module -> the last part -> the name."""
    places: dict[str, dict[str, str]] = {}
    bases = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    parts = [f"{base}.{last}" for base in bases for last in (*CODED, "bias")]
    listed = _with_codes(network)
    for name, key, converter, _ in _renamed(network, [part for part in parts if part in names], listed):
        # A layer that is none of the network's keeps its name: who wanted it there is told so.
        path, _, last = (name if key is None or converter is not None else key).rpartition(".")
        places.setdefault(path, {})[last] = name
    return places


def names_of_codes(network: transformers.PreTrainedModel, weights: Mapping[str, str]) -> dict[str, str]:
    """What the names of a layer's codes begin with in a checkpoint, by the path of its module.

    `weights` are the names by which the files have the weights of these layers. Theirs serve where transformers leads
    them to the module; the path itself serves elsewhere.
    """
    bases = {path: name.removesuffix(".weight") for path, name in weights.items()}
    names = [f"{base}.{last}" for base in bases.values() for last in CODED]
    found = {name: key for name, key, converter, _ in _renamed(network, names, _with_codes(network)) if not converter}
    return {
        path: base if all(found.get(f"{base}.{last}") == f"{path}.{last}" for last in CODED) else path
        for path, base in bases.items()
    }


@dataclass
class _Group:
    """What one converter makes of several tensors, collected name by name."""

    network: transformers.PreTrainedModel
    key: str
    converter: WeightConverter
    patterns: dict[str, str] = field(default_factory=dict)  # of the converter, by the name of the stored tensor

    def placement(self, stored: Mapping[str, TensorLayout]) -> Placement:
        made = self.convert(lambda name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta"))
        layouts = {key: TensorLayout(tensor.dtype, tuple(tensor.shape)) for key, tensor in made.items()}
        return Placement(tuple(self.patterns), layouts, self.convert)

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter: Any = deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.key, name, pattern, lambda name=name: read(name))
        try:
            made = converter.convert(self.key, model=self.network, config=self.network.config)
        except Exception as error:  # shapes that cannot be cut or joined come out as an error of any kind
            line = shortened(str(error).partition("\n")[0], 200)
            name = next(iter(self.patterns))
            raise ModelError(f"{name} in the model's files does not make {self.key} ({line})") from error
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _renamed(
    network: transformers.PreTrainedModel, names: Collection[str], listed: Mapping[str, Tensor]
) -> Iterator[tuple[str, str | None, WeightConverter | None, str]]:
    """Each name of a file in transformers' order: its key in the network, the converter it goes through, and by which
    of its patterns. `listed` are the network's tensors by key; None for a name that leads to none of them.
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
        if key not in listed and name in listed:  # as from_pretrained does: a name that was right needs no change
            key, pattern = rename_source_key(name, [], [], prefix, tensors)
        converter = None if pattern is None else by_pattern[pattern]
        yield name, key if key in listed else None, converter, pattern or name


def _with_codes(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network by key, as if every linear layer had codes."""
    nothing = torch.empty(0, device="meta")
    linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return {**network.state_dict(), **{f"{path}.{last}": nothing for path in linears for last in CODED}}
