from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from aqlm_cli.errors import PlanError, UsageError
from aqlm_cli.spec.plan import ROUTER, Layer, Plan, make_plan
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_cli.spec.selection import Selection
from aqlm_cli.spec.treatment import parse_treatment

LAYERS = [
    Layer("model.layers.0.attn.q", 64, 32, bias=True),
    Layer("model.layers.0.mlp.up", 96, 32, bias=False),
    Layer("model.layers.1.attn.q", 64, 32, bias=True),
    Layer("model.layers.1.mlp.up", 96, 32, bias=False),
]
WEIGHTS = 2 * (64 + 96) * 32
PARAMETERS = WEIGHTS + 5000


def planned(
    scheme: str = "2x8g8", skip: Sequence[str] = (), only: Sequence[str] = (), layers: Sequence[Layer] = LAYERS
) -> Plan:
    return make_plan(layers, PARAMETERS, Selection(parse_treatment(scheme), skip, only))


def paths(plan: Plan) -> list[str]:
    return [target.path for target in plan.quantized]


def test_every_layer_is_a_target_with_either_a_scheme_or_a_reason() -> None:
    strange = Layer("model.layers.0.mlp.experts", 96, 32, bias=False, reason="fused")
    plan = planned(skip=[".*attn.*"], layers=[*LAYERS, strange])
    assert [target.path for target in plan.targets] == [layer.path for layer in [*LAYERS, strange]]
    assert all((target.scheme is None) != (target.reason is None) for target in plan.targets)
    assert plan.skipped[-1].reason == "fused"
    assert len(plan.quantized) == 2


def test_patterns_match_whole_paths() -> None:
    assert len(paths(planned(only=[r"model\.layers\.0\..*"]))) == 2
    with pytest.raises(PlanError, match=r"--only 'layers\.0' matches no layer"):
        planned(only=["layers.0"])


def test_skip_wins_over_only_and_each_says_so() -> None:
    plan = planned(only=[r".*\.0\..*"], skip=[r".*\.q"])
    assert paths(plan) == ["model.layers.0.mlp.up"]
    reasons = {target.path: target.reason for target in plan.skipped}
    assert reasons["model.layers.0.attn.q"] == r"skipped by '.*\.q'"
    assert "--only" in str(reasons["model.layers.1.mlp.up"])


def test_any_of_several_patterns_chooses() -> None:
    assert len(paths(planned(only=[r".*\.0\..*", r".*\.q"]))) == 3


def test_a_pattern_that_matches_nothing_is_refused_and_shows_a_path() -> None:
    with pytest.raises(PlanError, match=r"--skip 'mlp' matches no layer.*model\.layers\.0\.attn\.q"):
        planned(skip=["mlp"])


def test_the_head_may_be_skipped_though_it_is_never_a_target() -> None:
    assert len(paths(planned(skip=["lm_head"]))) == 4
    with pytest.raises(PlanError):
        planned(only=["lm_head"])


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression"):
        planned(skip=["("])


def test_a_layer_whose_inputs_do_not_divide_into_groups_is_skipped_with_the_reason() -> None:
    plan = planned(layers=[*LAYERS, Layer("model.layers.1.mlp.odd", 8, 30, bias=False)])
    assert plan.skipped[0].path == "model.layers.1.mlp.odd"
    assert plan.skipped[0].reason == "30 input features are not a multiple of the group size 8"


# --------------------------------------------------------------------------------------- what had better stay as it is

WIDE = [
    Layer("model.layers.0.attn.q", 2048, 2048, bias=False),
    Layer("model.layers.0.mlp.up", 4096, 2048, bias=False),
    Layer("model.layers.0.mlp.small", 2, 2048, bias=False),
    Layer("model.layers.0.mlp.router", 60, 2048, bias=False, kind=ROUTER),
    Layer("model.layers.0.mlp.shared_gate", 1, 2048, bias=False, kind=ROUTER),
]


def wide(scheme: str = "2x8g8", skip: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    return make_plan(WIDE, 10**8, Selection(parse_treatment(scheme), skip, only))


def test_what_the_scheme_would_make_larger_stays_with_that_reason() -> None:
    plan = wide()
    reasons = {target.path.rpartition(".")[2]: str(target.reason) for target in plan.skipped}
    assert reasons.keys() == {"small", "router", "shared_gate"}
    assert all("2x8g8 and its codebooks would make it larger" in reasons[name] for name in ("small", "shared_gate"))
    assert reasons["router"].startswith("a router or gate")
    for target in WIDE[2], WIDE[4]:
        alone = make_plan(
            [target], target.out_features * 2048, Selection(parse_treatment("2x8g8"), [], [".*" + target.path[-5:]])
        )
        assert alone.bytes_after > alone.bytes_before
    assert not plan.grown and plan.bytes_after < plan.bytes_before


def test_a_scheme_of_smaller_codebooks_takes_what_it_makes_smaller() -> None:
    assert [path.rpartition(".")[2] for path in paths(wide("2x4g8"))] == ["q", "up", "small"]


@pytest.mark.parametrize("scheme", ["2x8g8", "int4g64"])
def test_routers_stay_unless_they_are_named(scheme: str) -> None:
    routers = {"model.layers.0.mlp.router", "model.layers.0.mlp.shared_gate"}
    assert routers.isdisjoint(paths(wide(scheme)))
    assert routers.isdisjoint(paths(wide(scheme, only=[r".*\.mlp\..*"])))
    assert set(paths(wide(scheme, only=[r".*shared_gate"]))) == {"model.layers.0.mlp.shared_gate"}
    assert set(paths(wide(scheme, only=[r".*(router|_gate)"]))) == routers
    assert set(paths(wide(scheme, only=[r".*(router|up)"]))) == {"model.layers.0.mlp.router", "model.layers.0.mlp.up"}
    assert routers.isdisjoint(paths(wide(scheme, only=[r".*"], skip=[r".*(router|_gate)"])))


def test_named_layers_are_quantized_although_they_grow_and_are_told_of() -> None:
    plan = wide(only=[r".*(small|up)"])
    assert [target.path.rpartition(".")[2] for target in plan.grown] == ["small"]


def test_a_scheme_too_large_for_the_model_is_applied_as_asked_and_told_of() -> None:
    gate = Layer("model.layers.0.mlp.gate", 1, 32, bias=False, kind=ROUTER)
    plan = planned(layers=[*LAYERS, gate])
    assert plan.grown == plan.quantized and len(plan.quantized) == len(LAYERS)
    assert [target.path for target in plan.skipped] == [gate.path]


def test_routers_alone_are_nothing_to_quantize() -> None:
    with pytest.raises(PlanError, match=r"nothing is left .* 1 layers: 2x8g8 and its codebooks .* name it with --only"):
        make_plan(WIDE[4:], 2048, Selection(parse_treatment("2x8g8")))


def test_nothing_left_is_refused_with_the_reasons_counted() -> None:
    with pytest.raises(PlanError, match=r"nothing is left .* 2 layers: skipped by .*; 2 layers: .*multiple.*"):
        planned("2x8g64", skip=[r".*\.q"])


@pytest.mark.parametrize("scheme", ["2x8g8", "1x12g8", "int2g16"])
def test_bits_are_those_of_the_scheme_weighted_by_the_layers(scheme: str) -> None:
    plan, known = planned(scheme), parse_scheme(scheme)
    expected = sum(known.stored_bits(layer.out_features, layer.in_features) for layer in LAYERS) / WEIGHTS
    assert plan.stored_bits == pytest.approx(expected)
    assert plan.code_bits == known.code_bits < plan.stored_bits


def test_bytes_count_codes_codebooks_scales_and_everything_that_stays() -> None:
    plan = planned("2x8g8", skip=["model.layers.1.mlp.up"])
    assert plan.bytes_before == 2 * PARAMETERS
    matrices = sum(out * 32 // 8 * 2 + 2 * (2 * 256 * 8) + 2 * out for out in (64, 96, 64))
    assert plan.bytes_after == matrices + 2 * (96 * 32) + 2 * 5000


def test_codes_of_more_than_eight_bits_take_two_bytes_in_the_file() -> None:
    plan = planned("1x12g8")
    matrices = sum(out * 32 // 8 * 2 + 2 * (4096 * 8) + 2 * out for out in (64, 96, 64, 96))
    assert plan.bytes_after == matrices + 2 * 5000


def test_what_the_package_aqlm_cannot_hold_has_the_bytes_of_the_native_format() -> None:
    plan = planned("int2g16")
    assert plan.stored_bits == 2 + (16 + 2) / 16
    exponents = 2 * len(LAYERS)
    assert plan.bytes_after == plan.stored_bits * WEIGHTS / 8 + exponents + 2 * 5000 and not plan.is_stock
    mixed = replace(plan, targets=(replace(plan.targets[0], scheme=parse_scheme("1x12g8")), *plan.targets[1:]))
    bits = [target.scheme.stored_bits(target.out_features, target.in_features) for target in mixed.quantized]
    assert mixed.bytes_after == sum(bits) / 8 + exponents - 2 + 2 * 5000
    table = replace(planned("1x12g8").targets[0], kind="table")
    plan = replace(planned("1x12g8"), targets=(table, *planned("1x12g8").targets[1:]))
    assert plan.bytes_after < planned("1x12g8").bytes_after, "codes of 12 bits take 12 bits there"


@pytest.mark.parametrize("scheme", ["2x8g8", "int4g32"])
def test_a_plan_survives_json(scheme: str) -> None:
    plan = make_plan(LAYERS, PARAMETERS, Selection(parse_treatment(scheme), [r".*\.q"]))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
