"""Scores: the solution is the best of all choices, tables included, and survives being stored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.allocation_record import AllocationRecord, Candidate, Mix, of_blocks, single_schemes
from aqlm_cli.spec.choices import Choice, OpenLayer, open_layers
from aqlm_cli.spec.plan import Layer
from aqlm_cli.spec.priors import expected_divergence, expected_error, group_of, sensitivity
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_cli.spec.scores import SIXTEEN_BITS, Effects, Goal, ScoredLayer, ScoredOption, Scores, expected_scores
from aqlm_cli.spec.selection import Rule, Selection
from aqlm_cli.spec.target import TargetConfig
from aqlm_cli.spec.treatment import parse_treatment

WORDS = ("aqlm:1x8g8", "aqlm:2x8g8", SIXTEEN_BITS)


def layer(group: str, table: bool, numbers: list[tuple[int, int, float]]) -> ScoredLayer:
    options = tuple(ScoredOption(word, *values) for word, values in zip(WORDS, numbers, strict=False))
    return ScoredLayer(group, 0.0 if table else 2.0, table, options)


NUMBERS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=3)
SCORES = st.tuples(st.lists(NUMBERS, min_size=1, max_size=3), st.lists(NUMBERS, max_size=2)).map(
    lambda pair: Scores(
        {f"a.{n}": layer(f"g{n % 2}", False, one) for n, one in enumerate(pair[0])}
        | {f"t.{n}": layer("t", True, one) for n, one in enumerate(pair[1])}
    )
)
EFFECTS = st.builds(
    lambda a, b, power: Effects({"g0": a, "g1": b}, power),
    st.floats(0.1, 3),
    st.floats(0.1, 3),
    st.sampled_from([0.5, 1.0]),
)


def all_choices(scores: Scores) -> Iterator[dict[str, str]]:
    words = [[option.word for option in one.options] for one in scores.layers.values()]
    for choice in itertools.product(*words):
        yield dict(zip(scores.layers, choice, strict=True))


@given(SCORES, EFFECTS, st.integers(0, 150))
def test_the_solution_for_a_size_diverges_least_of_all(scores: Scores, effects: Effects, limit: int) -> None:
    possible = [scores.divergence(one, effects) for one in all_choices(scores) if scores.bytes(one) <= limit]
    if not possible:
        with pytest.raises(PlanError):
            scores.solve(effects, Goal("size", limit))
        return
    solution = scores.solve(effects, Goal("size", limit))
    assert solution.bytes == scores.bytes(solution.choices) <= limit
    assert solution.divergence == pytest.approx(min(possible), rel=1e-6, abs=1e-9)


@given(SCORES, EFFECTS, st.floats(0.01, 5))
def test_the_solution_for_a_divergence_is_the_smallest_of_all(scores: Scores, effects: Effects, limit: float) -> None:
    sizes = [scores.bytes(one) for one in all_choices(scores) if scores.divergence(one, effects) <= limit * (1 - 1e-6)]
    if sizes:
        solution = scores.solve(effects, Goal("kl", limit))
        assert solution.divergence <= limit * (1 + 1e-6)
        assert solution.bytes <= min(sizes)


def test_a_record_survives_being_stored() -> None:
    scores = Scores({"a": layer("g0", False, [(1, 1, 0.5), (2, 2, 0.1), (9, 9, 0.0)])})
    mixes = (Mix({"a": WORDS[0]}, 0.7),)
    candidates = (Candidate({"a": WORDS[0]}, 1, 0.7, None, 3.0), Candidate({"a": WORDS[1]}, 2, 0.2, 1, 3.0))
    record = AllocationRecord(Goal("size", 3.0), scores, mixes, candidates)
    again = AllocationRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert again.chosen == candidates[1]
    assert again.treatments == {"a": parse_treatment("aqlm:2x8g8")}


def record() -> AllocationRecord:
    scores = Scores({"a": layer("g0", False, [(1, 1, 0.5), (2, 2, 0.1)]), "t": layer("t", True, [(1, 1, 0.2)])})
    choices = {"a": WORDS[1], "t": WORDS[0]}
    return AllocationRecord(Goal("size", 9), scores, (Mix({"a": WORDS[0]}, 0.7),), (Candidate(choices, 3, 0.3, 1, 9),))


DAMAGES: dict[str, tuple[tuple[str | int, ...], object]] = {
    "question": (("goal", "question"), "bits"),
    "limit": (("goal", "limit"), "9"),
    "no candidate": (("candidates",), []),
    "no layer": (("layers",), {}),
    "bytes": (("layers", "a", "options", 0, "bytes"), "1"),
    "effect": (("layers", "a", "options", 0, "effect"), math.nan),
    "sensitivity": (("layers", "a", "sensitivity"), None),
    "divergence": (("candidates", 0, "divergence"), True),
    "mixes": (("candidates", 0, "mixes"), 2),
    "mix": (("mixes", 0, "divergence"), math.inf),
    "unknown choice": (("candidates", 0, "choices", "a"), "aqlm:7x8g8"),
    "missing choice": (("candidates", 0, "choices"), {"a": WORDS[0]}),
    "foreign layer": (("mixes", 0, "choices"), {"b": WORDS[0]}),
    "table in a mix": (("mixes", 0, "choices"), {"a": WORDS[0], "t": WORDS[0]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_does_not_fit_itself_is_refused(damage: str) -> None:
    stored: Any = json.loads(json.dumps(record().to_json()))
    assert AllocationRecord.from_json(stored) == record()
    (*path, last), value = DAMAGES[damage]
    part = stored
    for key in path:
        part = part[key]
    part[last] = value
    with pytest.raises(ValueError, match=r"no question|no candidate|finite|is solved from|has no choice|other layers"):
        AllocationRecord.from_json(stored)


def test_a_divergence_takes_the_smallest_plan_that_keeps_it_or_the_nearest() -> None:
    sizes = ((1, 0.9), (5, 0.3), (7, 0.1))
    candidates = tuple(Candidate({}, size, kl, 0, 0.4) for size, kl in sizes)
    assert AllocationRecord(Goal("kl", 0.4), Scores({}), (), candidates).chosen.bytes == 5
    assert AllocationRecord(Goal("kl", 0.05), Scores({}), (), candidates).chosen.bytes == 7


def test_a_candidate_is_a_mix_without_its_tables() -> None:
    scores = Scores({"a": layer("g", False, [(1, 1, 0.5)]), "t": layer("t", True, [(1, 1, 0.25)])})
    mix = of_blocks(scores, Candidate({"a": WORDS[0], "t": WORDS[0]}, 2, 1.0, None, 9.0))
    assert mix == Mix({"a": WORDS[0]}, 0.75)


def test_single_schemes_leave_the_tables_open() -> None:
    numbers = [(1, 1, 0.5), (2, 2, 0.1), (9, 9, 0.0)]
    scores = Scores({"a": layer("g", False, numbers), "t": layer("t", True, numbers)})
    larger, smaller = single_schemes(scores, ["aqlm:1x8g8", "aqlm:2x8g8"])
    assert [option.word for option in larger.layers["a"].options] == ["aqlm:2x8g8"]
    assert [option.word for option in smaller.layers["a"].options] == ["aqlm:1x8g8"]
    assert larger.layers["t"] == scores.layers["t"]


LAYERS = [
    Layer("model.embed", 1000, 64, False, "table"),
    *(Layer(f"model.layers.{n}.{name}", 64, 64, False) for n in range(3) for name in ("v_proj", "o_proj")),
    Layer("model.layers.0.gate", 8, 64, False, "router"),
]
BLOCKS = [f"model.layers.{n}" for n in range(3)]


def opened(**fields: object) -> dict[str, OpenLayer]:
    selection = Selection(parse_treatment("2x8g8"), **fields)  # type: ignore[arg-type]
    return open_layers(LAYERS, 10**6, selection, TargetConfig(size="1MB"), BLOCKS, native=True)


def test_rules_given_tables_and_skipped_layers_are_not_decided() -> None:
    assert opened().keys() == {layer.path for layer in LAYERS} - {"model.layers.0.gate"}
    assert "model.layers.0.v_proj" not in opened(rules=[Rule(r".*0\.v_proj", None)])
    assert "model.embed" not in opened(embeddings=parse_treatment("int8g64"))
    assert "model.layers.1.o_proj" not in opened(skip=[r".*o_proj"])


def test_every_choice_is_smaller_than_16_bits_and_ordered_by_its_bits() -> None:
    for one in opened().values():
        *quantized, kept = one.choices
        assert kept.treatment is None and str(kept) == SIXTEEN_BITS
        sizes = {choice.treatment: choice.bytes for choice in quantized if choice.treatment is not None}
        additive = [size for one_of, size in sizes.items() if one_of.scheme.kind == "additive" and not one_of.finer]
        assert additive == sorted(additive)
        assert all(size < sizes[coarse.finer] for coarse, size in sizes.items() if coarse.finer)
        assert one.outside or one.depth == float(one.path.split(".")[2]) / 2


def test_an_embedding_reads_one_row_for_a_token() -> None:
    layers = [Layer("embed", 1000, 64, False, "embedding"), *LAYERS[1:]]
    found = open_layers(layers, 10**6, Selection(parse_treatment("2x8g8")), TargetConfig(size="1MB"), BLOCKS, True)
    assert all(choice.read <= choice.bytes / 900 for choice in found["embed"].choices)


def test_priors_fall_with_bits_and_differ_by_kind() -> None:
    errors = [expected_error(parse_scheme(word)) for word in ("1x8g8", "2x8g8", "3x8g8", "4x8g8")]
    assert errors == sorted(errors, reverse=True)
    layers = opened()
    assert sensitivity(layers["model.layers.0.v_proj"]) > sensitivity(layers["model.layers.0.o_proj"])
    assert group_of(layers["model.layers.2.v_proj"]) == "v_proj 2"
    scores = expected_scores(layers)
    assert scores.solve(Effects(), Goal("size", 60_000)).bytes <= 60_000
    assert isinstance(layers["model.embed"].choices[0], Choice)


@pytest.mark.parametrize(("rows", "share"), [(256, 0.69), (1024, 0.51), (4096, 0.38)])
def test_refined_rows_lower_the_divergence_that_is_expected_of_a_table(rows: int, share: float) -> None:
    """As measured on the table of SmolLM2-135M in 3x8g8."""
    table = OpenLayer("embed_tokens", "table", 49152, 576, 0.0, ())
    base, refined = (expected_divergence(table, parse_scheme(f"3x8g8{end}")) for end in ("", f"+int4g64r{rows}"))
    assert refined / base == pytest.approx(share, abs=0.03)
