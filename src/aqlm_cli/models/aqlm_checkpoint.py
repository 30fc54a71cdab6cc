"""The plan of an AQLM checkpoint that others made, read from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.models.loading import Network
from aqlm_cli.models.names import CODE_TENSORS, places_of_codes
from aqlm_cli.models.quantization import is_native, is_quantized
from aqlm_cli.models.source import ModelSource, StoredTensor, model_config, tensor_index
from aqlm_cli.spec.plan import ROUTER, Layer, Plan, Target
from aqlm_cli.spec.schemes import AdditiveScheme

STOCK = "linear", ROUTER
"""The kinds of layers for which the format has codes."""


def plan_of_checkpoint(
    checkpoint: ModelSource, original: ModelSource, network: Network, layers: Sequence[Layer], parameters: int
) -> Plan:
    """The plan by which the layers of the base model became those of the checkpoint.

    `network` is that of the base model, `layers` are those in its blocks, and it has `parameters` parameters in all.
    Raises ModelError if there is no such plan: no codes at all, codes outside of these layers or of other shapes, or
    codes of several schemes, which the format cannot name.
    """
    if not is_quantized(checkpoint) or is_native(checkpoint):
        raise ModelError(
            f"{checkpoint.name} is not an AQLM checkpoint, its config.json says otherwise; a run with additive "
            "codes becomes one by `aqlm pack RUN --format transformers --overwrite`"
        )
    kinds = [str(model_config(source).get("model_type")) for source in (checkpoint, original)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{checkpoint.name} has model type {kinds[0]}, {original.name} has {kinds[1]}; name its base model "
            "with --teacher"
        )
    stored = tensor_index(checkpoint.directory)
    coded = {
        path: {last: stored[name] for last, name in names.items()}
        for path, names in places_of_codes(network, stored).items()
    }
    outside = sorted(coded.keys() - {layer.path for layer in layers if layer.reason is None and layer.kind in STOCK})
    if outside:
        raise ModelError(
            f"{checkpoint.name} has codes for {outside[0]}; only codes of linear layers in the blocks of "
            f"{original.name} can be imported"
        )
    schemes = {layer.path: _scheme(checkpoint, layer, coded[layer.path]) for layer in layers if layer.path in coded}
    names = sorted({str(scheme) for scheme in schemes.values()})
    if len(names) != 1:
        raise ModelError(f"{checkpoint.name} has layers of {len(names)} schemes ({', '.join(names)}); it must have one")
    targets = []
    for layer in layers:
        scheme = schemes.get(layer.path)
        reason = None if scheme is not None else layer.reason or "has no codes in the checkpoint"
        targets.append(
            Target(
                layer.path,
                layer.kind,
                layer.out_features,
                layer.in_features,
                scheme,
                reason,
                "aqlm" if scheme else None,
            )
        )
    return Plan(tuple(targets), parameters - sum(target.weights for target in targets))


def _scheme(checkpoint: ModelSource, layer: Layer, tensors: Mapping[str, StoredTensor]) -> AdditiveScheme:
    """The scheme of one layer, by the shapes of its tensors (aqlm_kernels/hf_layout.py)."""
    shapes = {name: list(tensors[name].shape) for name in CODE_TENSORS if name in tensors}
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    try:
        (_, groups, _), (num_codebooks, size, _, group_size) = shapes["codes"], shapes["codebooks"]
        scheme = AdditiveScheme(num_codebooks, size.bit_length() - 1, group_size)
    except (LookupError, ValueError, UsageError) as error:
        raise ModelError(f"{checkpoint.name}: {layer.path} has {found}: this is not a supported scheme") from error
    wanted = {
        "codes": [layer.out_features, layer.in_features // group_size, num_codebooks],
        "codebooks": [num_codebooks, scheme.codebook_size, 1, group_size],
        "scales": [layer.out_features, 1, 1, 1],
    }
    bias = "bias" in tensors
    if shapes != wanted or groups * group_size != layer.in_features or bias != layer.bias:
        raise ModelError(
            f"{checkpoint.name}: {layer.path} has {found} and {'a' if bias else 'no'} bias; the base model has "
            f"{layer.out_features} x {layer.in_features} weights and {'a' if layer.bias else 'no'} bias"
        )
    return scheme
