"""Plan: every matrix in the blocks, the embeddings and the head once, each with its treatment or the reason against it.

A plan is made before any work starts, printed, stored with the quantized model, and followed to the letter.  It is
arithmetic on names and shapes: it never sees a weight.

Sizes are those of a whole checkpoint, embeddings and head included, in bytes of tensors.  The format of the package
`aqlm` stores a code in one byte or two, so for codes of, say, 12 bits it is larger than `stored_bits` says: that figure
is the scheme's, and `bytes_after` is the file's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.schemes import BITS_PER_FLOAT, RefinedScheme, Scheme, parse_scheme, total_bytes
from aqlm_cli.spec.selection import HEAD, Pattern, Selection, compiled
from aqlm_cli.spec.treatment import Treatment, method_for

ROUTER = "router"
"""The kind of a linear layer that decides where tokens go, or how much of something they get."""

EXPERT = "expert"
"""The kind of one expert's matrix in a parameter that holds those of all experts."""

OUTSIDE = ("embedding", "head", "table")
"""The kinds of matrices outside the blocks. A table is embedding and head in one: those of a tied model."""

BYTES_PER_FLOAT = BITS_PER_FLOAT // 8
"""A value that is not quantized is stored in 16 bits."""

LARGER_SHARE = 0.1
"""A share of the weights that can be quantized: a scheme that makes more larger was not chosen to save bytes, and is
applied as asked."""


@dataclass(frozen=True)
class Layer:
    """A matrix of the model: of kind linear, ROUTER, expert, or one of OUTSIDE.

    `reason` says why its module cannot be quantized at all; None where it can.
    """

    path: str
    out_features: int
    in_features: int
    bias: bool
    kind: str = "linear"
    reason: str | None = None


@dataclass(frozen=True)
class Target:
    """The treatment of one matrix: exactly one of `scheme` and `reason` is set, and `method` with the scheme."""

    path: str
    kind: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str | None
    method: str | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def treatment(self) -> Treatment | None:
        """Method and scheme; None where it stays in 16 bits."""
        return None if self.scheme is None or self.method is None else Treatment(self.method, self.scheme)

    @property
    def bytes_after(self) -> int:
        """Bytes of the matrix in the format of the package `aqlm`."""
        if self.scheme is None:
            return BYTES_PER_FLOAT * self.weights
        return total_bytes(self.scheme.packed_layouts(self.out_features, self.in_features))

    @property
    def native_bytes(self) -> int:
        """Bytes of the matrix in the native format."""
        if self.scheme is None:
            return BYTES_PER_FLOAT * self.weights
        return total_bytes(self.scheme.native_layouts(self.out_features, self.in_features))


@dataclass(frozen=True)
class Plan:
    """The treatment of every matrix.

    `other_parameters` counts what lies outside of `targets`: norms, biases, and what is no matrix of its own.
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
    def treatments(self) -> dict[str, Treatment]:
        """Treatments of the quantized matrices, by path."""
        return {target.path: target.treatment for target in self.targets if target.treatment is not None}

    @property
    def scheme(self) -> str:
        """The schemes of all that is quantized: `2x8g8`, or with their counts `2x8g8 (179), 4x8g8 (31)`."""
        counts = Counter(str(scheme) for scheme in self.schemes.values())
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{word} ({count})" for word, count in counts.most_common())

    @property
    def method(self) -> str:
        """The methods of all that is quantized."""
        return ", ".join(dict.fromkeys(target.method for target in self.targets if target.method is not None))

    @property
    def tables(self) -> tuple[Target, ...]:
        """Quantized matrices outside the blocks."""
        return tuple(target for target in self.quantized if target.kind in OUTSIDE)

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
    def is_stock(self) -> bool:
        """True where the format of the package `aqlm` holds the plan: one scheme of its own, in linear layers alone.

        A scheme is its own if it has the same tensors there as in the native format.
        """
        shapes = [
            (target.scheme, (target.out_features, target.in_features))
            for target in self.targets
            if target.scheme is not None
        ]
        return (
            len(set(self.schemes.values())) == 1
            and all(target.kind in ("linear", ROUTER) for target in self.quantized)
            and all(
                scheme.packed_layouts(*shape).keys() == scheme.native_layouts(*shape).keys() for scheme, shape in shapes
            )
        )

    @property
    def bytes_after(self) -> int:
        """The tensors of the packed checkpoint: in the format of the package `aqlm` if it `is_stock`, else native."""
        stock = self.is_stock
        sizes = (target.bytes_after if stock else target.native_bytes for target in self.targets)
        return BYTES_PER_FLOAT * self.other_parameters + sum(sizes)

    def leaving(self, paths: Collection[str], reason: str) -> Plan:
        """The same plan but that the layers at `paths` stay in 16 bits."""
        kept = {target: replace(target, scheme=None, method=None, reason=reason) for target in self.targets}
        return replace(self, targets=tuple(kept[one] if one.path in paths else one for one in self.targets))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `from_json` is the inverse."""
        targets = [{**asdict(target), "scheme": target.scheme and str(target.scheme)} for target in self.targets]
        return {"targets": targets, "other_parameters": self.other_parameters}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        return cls(tuple(_read_target(target) for target in stored["targets"]), stored["other_parameters"])


def make_plan(layers: Sequence[Layer], parameters: int, selection: Selection) -> Plan:
    """Give every layer its treatment, or the first reason against it.

    `parameters` counts all of the model's.  The patterns are regular expressions that must match a whole path; one
    that matches no layer is a mistake in spelling and raises PlanError, as does a choice that leaves nothing over, and
    embeddings or a head that are asked for and cannot be quantized so.

    Routers, and what the scheme would make larger, stay in 16 bits unless `only` or a rule names them.  Where it would
    make more than LARGER_SHARE of the weights larger, only the routers stay, and `Plan.grown` tells of the rest.
    """
    paths = [layer.path for layer in layers]
    inside = [layer for layer in layers if layer.kind not in OUTSIDE]
    rules = [(compiled(rule.match, paths, "layer"), rule.treatment) for rule in selection.rules]
    chosen = _chosen_by_default(inside, selection)
    for layer in layers:
        if layer.kind in OUTSIDE:
            chosen[layer.path] = _outside(layer, selection)
        for pattern, treatment in rules:
            if pattern.matches(layer.path):
                kept = f"kept by '{pattern.pattern}'"
                chosen[layer.path] = layer.reason or (kept if treatment is None else _fitting(layer, treatment))
                break
        else:
            if layer.path in selection.allocated:
                given = selection.allocated[layer.path]
                chosen[layer.path] = layer.reason or ("kept by the target" if given is None else _fitting(layer, given))
    targets = tuple(_target(layer, chosen[layer.path]) for layer in layers)
    if all(target.scheme is None for target in targets):
        reasons = _counted(target.reason for target in targets)
        raise PlanError(f"nothing is left to quantize with {selection.default.scheme}: {reasons}")
    return Plan(targets, parameters - sum(target.weights for target in targets))


Choice: TypeAlias = Treatment | str
"""The treatment of a layer, or the reason why it stays in 16 bits."""


def _read_target(stored: Mapping[str, Any]) -> Target:
    scheme = stored["scheme"] and parse_scheme(stored["scheme"])
    method = scheme and method_for(scheme)  # which plans of one method for all leave out
    return Target(**{"method": method or None, **stored, "scheme": scheme or None})


def _chosen_by_default(layers: Sequence[Layer], selection: Selection) -> dict[str, Choice]:
    """The choice for each layer in the blocks that no rule names, by path."""
    paths, default = [layer.path for layer in layers], selection.default
    skipping = [compiled(pattern, [*paths, HEAD], "skip") for pattern in selection.skip]
    choosing = [compiled(pattern, paths, "only") for pattern in selection.only]
    chosen: dict[str, Choice] = {
        layer.path: layer.reason or _unwanted(layer.path, skipping, choosing) or _fitting(layer, default)
        for layer in layers
    }
    open_layers = [layer for layer in layers if chosen[layer.path] == default]
    better_left = {layer.path: why for layer in open_layers if (why := _better_left(layer, default))}
    ordinary = {layer.path: layer.out_features * layer.in_features for layer in open_layers if layer.kind != ROUTER}
    if sum(ordinary[path] for path in ordinary.keys() & better_left) > LARGER_SHARE * sum(ordinary.values()):
        better_left = {path: why for path, why in better_left.items() if path not in ordinary}
    named = _named(choosing, [layer.path for layer in open_layers], better_left)
    return chosen | {path: why for path, why in better_left.items() if path not in named}


def _outside(layer: Layer, selection: Selection) -> Choice:
    """The choice for embeddings, a head or both in one. PlanError where they are asked for and cannot be quantized."""
    asked = {"embedding": selection.embeddings, "head": selection.head}
    treatment = selection.of_table(layer.path) if layer.kind == "table" else asked[layer.kind]
    if treatment is None:
        flag = "head" if layer.kind == "head" else "embeddings"
        return layer.reason or f"outside the blocks; --{flag} SCHEME quantizes it"
    refusal = layer.reason or treatment.scheme.refuses(layer.out_features, layer.in_features)
    if refusal is not None:
        raise PlanError(f"{layer.path} cannot be quantized with {treatment.scheme}: {refusal}")
    return treatment


def _fitting(layer: Layer, treatment: Treatment) -> Choice:
    if isinstance(treatment.scheme, RefinedScheme) and layer.kind not in OUTSIDE:
        return f"{treatment.scheme} refines the rows of the tokens that are used most; it is for embeddings and heads"
    return treatment.scheme.refuses(layer.out_features, layer.in_features) or treatment


def _target(layer: Layer, choice: Choice) -> Target:
    shape = layer.path, layer.kind, layer.out_features, layer.in_features
    if isinstance(choice, str):
        return Target(*shape, scheme=None, reason=choice)
    return Target(*shape, choice.scheme, None, choice.method)


def _better_left(layer: Layer, treatment: Treatment) -> str | None:
    """Return the reason why a layer that could be quantized had better stay in 16 bits, or None."""
    target = _target(layer, treatment)
    if target.bytes_after > BYTES_PER_FLOAT * target.weights:
        return f"{target.scheme} and its codebooks would make it larger than it is; name it with --only to quantize it"
    if layer.kind == ROUTER:
        return "a router or gate, which is small and decides much; name it with --only to quantize it"
    return None


def _named(choosing: Sequence[Pattern], paths: Sequence[str], better_left: Mapping[str, str]) -> set[str]:
    """Paths of `better_left` that are asked for: by a pattern with their last name in it, or that matches no others."""
    named: set[str] = set()
    for pattern in choosing:
        matched = {path for path in paths if pattern.matches(path)}
        alone = matched <= better_left.keys()
        named |= {path for path in matched if alone or path.rpartition(".")[2] in pattern.pattern}
    return named


def _unwanted(path: str, skipping: Sequence[Pattern], choosing: Sequence[Pattern]) -> str | None:
    for pattern in skipping:
        if pattern.matches(path):
            return f"skipped by '{pattern.pattern}'"
    if choosing and not any(pattern.matches(path) for pattern in choosing):
        return "not among those chosen with --only"
    return None


def _counted(reasons: Iterable[str | None]) -> str:
    return "; ".join(f"{count} layers: {reason}" for reason, count in Counter(reasons).items())
