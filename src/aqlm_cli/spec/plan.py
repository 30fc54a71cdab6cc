"""Plan: every matrix inside the blocks once, with its treatment or the reason why it keeps its 16 bits.

A plan is made before any work starts, printed, stored with the quantized model, and followed to the letter.  It is
arithmetic on names and shapes: it never sees a weight.

Sizes are those of a whole checkpoint, embeddings and head included, in bytes of tensors.  A packed file stores a code
in one byte or two, so for codes of, say, 12 bits it is larger than `stored_bits` says: that figure is the scheme's,
and `bytes_after` is the file's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aqlm_cli.errors import PlanError, UsageError
from aqlm_cli.spec.schemes import BITS_PER_FLOAT, Scheme, parse_scheme, total_bytes

HEAD = "lm_head"
"""The output head lies outside the blocks and is never a target, so that to skip it is right for every model."""

ROUTER = "router"
"""The kind of a linear layer that decides where tokens go, or how much of something they get."""

EXPERT = "expert"
"""The kind of one expert's matrix in a parameter that holds those of all experts."""

BYTES_PER_FLOAT = BITS_PER_FLOAT // 8
"""A value that is not quantized is stored in 16 bits."""

LARGER_SHARE = 0.1
"""A share of the weights that can be quantized: a scheme that makes more larger was not chosen to save bytes, and is
applied as asked."""


@dataclass(frozen=True)
class Layer:
    """A matrix of the model.  `reason` says why its module cannot be quantized at all; None for an ordinary linear."""

    path: str
    out_features: int
    in_features: int
    bias: bool
    kind: str = "linear"
    reason: str | None = None


@dataclass(frozen=True)
class Target:
    """The treatment of one matrix: exactly one of `scheme` and `reason` is set."""

    path: str
    kind: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str | None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bytes_after(self) -> int:
        """Bytes of the matrix in a packed checkpoint."""
        if self.scheme is None:
            return BYTES_PER_FLOAT * self.weights
        return total_bytes(self.scheme.packed_layouts(self.out_features, self.in_features))


@dataclass(frozen=True)
class Plan:
    """The treatment of every matrix in the blocks.

    `other_parameters` counts what lies outside of `targets`: embeddings, head, norms, and all biases.
    """

    targets: tuple[Target, ...]
    other_parameters: int

    @property
    def quantized(self) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.scheme is not None)

    @property
    def grown(self) -> tuple[Target, ...]:
        """Targets that are quantized although they become larger than in 16 bits."""
        return tuple(target for target in self.quantized if target.bytes_after > BYTES_PER_FLOAT * target.weights)

    @property
    def skipped(self) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.scheme is None)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Schemes of the quantized matrices, by path."""
        return {target.path: target.scheme for target in self.targets if target.scheme is not None}

    @property
    def scheme(self) -> Scheme:
        """The one of all that is quantized."""
        (scheme,) = set(self.schemes.values())
        return scheme

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per quantized weight."""
        schemes = [(target.scheme, target.weights) for target in self.targets if target.scheme is not None]
        return sum(scheme.code_bits * weights for scheme, weights in schemes) / sum(weights for _, weights in schemes)

    @property
    def stored_bits(self) -> float:
        """Bits of codes, codebooks and scales per quantized weight."""
        bits = sum(
            target.scheme.stored_bits(target.out_features, target.in_features)
            for target in self.targets
            if target.scheme is not None
        )
        return bits / sum(target.weights for target in self.quantized)

    @property
    def bytes_before(self) -> int:
        """The model in 16 bits."""
        return BYTES_PER_FLOAT * (self.other_parameters + sum(target.weights for target in self.targets))

    @property
    def bytes_after(self) -> int:
        """The tensors of the packed checkpoint."""
        return BYTES_PER_FLOAT * self.other_parameters + sum(target.bytes_after for target in self.targets)

    def leaving(self, paths: Collection[str], reason: str) -> Plan:
        """The same plan but that the layers at `paths` stay in 16 bits."""
        targets = (
            replace(target, scheme=None, reason=reason) if target.path in paths else target for target in self.targets
        )
        return replace(self, targets=tuple(targets))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `from_json` is the inverse."""
        targets = [{**asdict(target), "scheme": target.scheme and str(target.scheme)} for target in self.targets]
        return {"targets": targets, "other_parameters": self.other_parameters}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        targets = (
            Target(**{**target, "scheme": target["scheme"] and parse_scheme(target["scheme"])})
            for target in stored["targets"]
        )
        return cls(tuple(targets), stored["other_parameters"])


def make_plan(
    layers: Sequence[Layer], parameters: int, scheme: Scheme, skip: Sequence[str], only: Sequence[str]
) -> Plan:
    """Give every layer the scheme, or the first reason against it.

    `parameters` counts all of the model's.  `skip` and `only` are regular expressions that must match a whole path; one
    that matches no layer is a mistake in spelling and raises PlanError, as does a choice that leaves nothing over.

    Routers, and what the scheme would make larger, stay in 16 bits unless `only` names them.  Where it would make more
    than LARGER_SHARE of the weights larger, only the routers stay, and `Plan.grown` tells of the rest.
    """
    paths = [layer.path for layer in layers]
    skipping = [_compiled(pattern, [*paths, HEAD], "skip") for pattern in skip]
    choosing = [_compiled(pattern, paths, "only") for pattern in only]
    reasons = {
        layer.path: layer.reason
        or _unwanted(layer.path, skipping, choosing)
        or scheme.refuses(layer.out_features, layer.in_features)
        for layer in layers
    }
    open_layers = [layer for layer in layers if reasons[layer.path] is None]
    better_left = {layer.path: why for layer in open_layers if (why := _better_left(layer, scheme))}
    ordinary = {layer.path: layer.out_features * layer.in_features for layer in open_layers if layer.kind != ROUTER}
    if sum(ordinary[path] for path in ordinary.keys() & better_left) > LARGER_SHARE * sum(ordinary.values()):
        better_left = {path: why for path, why in better_left.items() if path not in ordinary}
    named = _named(choosing, [layer.path for layer in open_layers], better_left)
    reasons |= {path: why for path, why in better_left.items() if path not in named}
    targets = tuple(_target(layer, scheme, reasons[layer.path]) for layer in layers)
    if all(target.scheme is None for target in targets):
        raise PlanError(f"nothing is left to quantize with {scheme}: {_counted(target.reason for target in targets)}")
    return Plan(targets, parameters - sum(target.weights for target in targets))


def _target(layer: Layer, scheme: Scheme, reason: str | None) -> Target:
    treatment = None if reason else scheme
    return Target(layer.path, layer.kind, layer.out_features, layer.in_features, treatment, reason)


def _better_left(layer: Layer, scheme: Scheme) -> str | None:
    """Return the reason why a layer that could be quantized had better stay in 16 bits, or None."""
    target = _target(layer, scheme, None)
    if target.bytes_after > BYTES_PER_FLOAT * target.weights:
        return f"{scheme} and its codebooks would make it larger than it is; name it with --only to quantize it"
    if layer.kind == ROUTER:
        return "a router or gate, which is small and decides much; name it with --only to quantize it"
    return None


def _named(choosing: Sequence[re.Pattern[str]], paths: Sequence[str], better_left: Mapping[str, str]) -> set[str]:
    """Paths of `better_left` that are asked for: by a pattern with their last name in it, or that matches no others."""
    named: set[str] = set()
    for pattern in choosing:
        matched = {path for path in paths if pattern.fullmatch(path)}
        alone = matched <= better_left.keys()
        named |= {path for path in matched if alone or path.rpartition(".")[2] in pattern.pattern}
    return named


def _compiled(pattern: str, paths: Sequence[str], flag: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--{flag} '{pattern}' is not a regular expression: {error}") from error
    if not any(compiled.fullmatch(path) for path in paths):
        raise PlanError(f"--{flag} '{pattern}' matches no layer; it must match a whole path, such as {paths[0]}")
    return compiled


def _unwanted(path: str, skipping: Sequence[re.Pattern[str]], choosing: Sequence[re.Pattern[str]]) -> str | None:
    for pattern in skipping:
        if pattern.fullmatch(path):
            return f"skipped by '{pattern.pattern}'"
    if choosing and not any(pattern.fullmatch(path) for pattern in choosing):
        return "not among those chosen with --only"
    return None


def _counted(reasons: Iterable[str | None]) -> str:
    return "; ".join(f"{count} layers: {reason}" for reason, count in Counter(reasons).items())
