"""What an AQLM checkpoint has made of the layers of a model, told by the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.models.loading import Network
from aqlm_cli.models.names import CODED, places_of_codes
from aqlm_cli.models.quantization import is_coded
from aqlm_cli.models.source import ModelSource, StoredTensor, model_config, tensor_index
from aqlm_cli.spec.plan import Layer, Plan, Target
from aqlm_cli.spec.schemes import AdditiveScheme


def plan_of_checkpoint(
    checkpoint: ModelSource, original: ModelSource, network: Network, layers: Sequence[Layer], parameters: int
) -> Plan:
    """The plan by which the layers of the original became those of the checkpoint, whoever followed it.

    `network` is the original's, `layers` are those in its blocks, and it has so many `parameters` in all. Raises
    ModelError where there can be no such plan: no codes at all, codes outside of these layers or of other shapes, or of
    several schemes, which the format could not name again.
    """
    if not is_coded(checkpoint):
        raise ModelError(
            f"{checkpoint.name} is no AQLM checkpoint, its config.json names no such quantization; a run with additive "
            "codes becomes one by `aqlm pack RUN --format transformers --overwrite`"
        )
    kinds = [str(model_config(source).get("model_type")) for source in (checkpoint, original)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{checkpoint.name} is of the family {kinds[0]}, {original.name} of {kinds[1]}; name the model that it was "
            "made from with --teacher"
        )
    stored = tensor_index(checkpoint.directory)
    coded = {
        path: {last: stored[name] for last, name in names.items()}
        for path, names in places_of_codes(network, stored).items()
    }
    outside = sorted(coded.keys() - {layer.path for layer in layers if layer.reason is None})
    if outside:
        raise ModelError(
            f"{checkpoint.name} has codes for {outside[0]}, and only those of linear layers in the blocks of "
            f"{original.name} can be taken over"
        )
    schemes = {layer.path: _scheme(checkpoint, layer, coded[layer.path]) for layer in layers if layer.path in coded}
    names = sorted({str(scheme) for scheme in schemes.values()})
    if len(names) != 1:
        raise ModelError(f"{checkpoint.name} has layers of {len(names)} schemes ({', '.join(names)}); it must have one")
    targets = []
    for layer in layers:
        scheme = schemes.get(layer.path)
        reason = None if scheme is not None else layer.reason or "has no codes in the checkpoint"
        targets.append(Target(layer.path, layer.kind, layer.out_features, layer.in_features, scheme, reason))
    return Plan(tuple(targets), parameters - sum(target.weights for target in targets))


def _scheme(checkpoint: ModelSource, layer: Layer, tensors: Mapping[str, StoredTensor]) -> AdditiveScheme:
    """That of one layer, by the shapes of its tensors (aqlm_kernels/checkpoint.py)."""
    shapes = {name: list(tensors[name].shape) for name in CODED if name in tensors}
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    try:
        (_, groups, _), (num_codebooks, size, _, group_size) = shapes["codes"], shapes["codebooks"]
        scheme = AdditiveScheme(num_codebooks, size.bit_length() - 1, group_size)
    except (LookupError, ValueError, UsageError) as error:
        raise ModelError(f"{checkpoint.name}: {layer.path} has {found}, which is no scheme that can be read") from error
    wanted = {
        "codes": [layer.out_features, layer.in_features // group_size, num_codebooks],
        "codebooks": [num_codebooks, scheme.codebook_size, 1, group_size],
        "scales": [layer.out_features, 1, 1, 1],
    }
    bias = "bias" in tensors
    if shapes != wanted or groups * group_size != layer.in_features or bias != layer.bias:
        raise ModelError(
            f"{checkpoint.name}: {layer.path} has {found} and {'a' if bias else 'no'} bias, and the original there "
            f"{layer.out_features} x {layer.in_features} weights and {'a' if layer.bias else 'no'} bias"
        )
    return scheme
