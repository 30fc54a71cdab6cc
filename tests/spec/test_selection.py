"""Rules, embeddings and head: which treatment each layer of a plan gets."""

from __future__ import annotations

import signal
import time

import pytest

from aqlm_cli.errors import AqlmError, PlanError, UsageError
from aqlm_cli.spec import selection
from aqlm_cli.spec.flags import QUANTIZE, as_settings
from aqlm_cli.spec.plan import Layer, Plan, make_plan
from aqlm_cli.spec.quantize import QuantizeConfig, parse_rule
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.treatment import Treatment, parse_treatment

BLOCKS = [
    Layer(f"model.layers.{block}.{name}", 512, 512, False) for block in (0, 1) for name in ("q_proj", "down_proj")
]
TIED = [Layer("model.embed_tokens", 4096, 512, False, "table"), *BLOCKS]
UNTIED = [
    Layer("model.embed_tokens", 4096, 512, False, "embedding"),
    *BLOCKS,
    Layer("lm_head", 4096, 512, False, "head"),
]
PARAMETERS = 4 * 512 * 512 + 2 * 4096 * 512 + 512


def planned(layers: list[Layer], *rules: str, **section: object) -> Plan:
    settings = QuantizeConfig.model_validate({"layers": [parse_rule(rule) for rule in rules], **section})
    return make_plan(layers, PARAMETERS, settings.selection)


def words(plan: Plan) -> dict[str, str]:
    return {target.path: str(target.treatment or target.reason) for target in plan.targets}


def test_the_first_rule_that_matches_counts_before_everything_else() -> None:
    found = words(
        planned(
            UNTIED,
            r".*\.1\.down_proj=keep",
            r".*down_proj=rtn:int4g32",
            r".*\.[01]\..*=3x8g8",
            "lm_head=int8g64",
            embeddings="4x8g8",
            skip=[r".*q_proj"],
        )
    )
    assert found == {
        "model.embed_tokens": "aqlm:4x8g8",
        "model.layers.0.q_proj": "aqlm:3x8g8",
        "model.layers.0.down_proj": "rtn:int4g32",
        "model.layers.1.q_proj": "aqlm:3x8g8",
        "model.layers.1.down_proj": "kept by '.*\\.1\\.down_proj'",
        "lm_head": "rtn:int8g64",
    }


def test_without_settings_nothing_outside_the_blocks_is_quantized() -> None:
    found = words(planned(UNTIED))
    assert found["model.embed_tokens"] == "outside the blocks; --embeddings SCHEME quantizes it"
    assert found["lm_head"] == "outside the blocks; --head SCHEME quantizes it"
    assert {found[layer.path] for layer in BLOCKS} == {"aqlm:2x8g8"}


@pytest.mark.parametrize("setting", ["embeddings", "head"])
def test_a_table_with_both_duties_takes_either_setting(setting: str) -> None:
    plan = planned(TIED, **{setting: "int8g64"})
    assert words(plan)["model.embed_tokens"] == "rtn:int8g64"
    assert [table.path for table in plan.tables] == ["model.embed_tokens"]
    assert words(planned(TIED, embeddings="int8g64", head="int8g64")) == words(plan)


def test_a_table_with_both_duties_has_one_treatment() -> None:
    with pytest.raises(PlanError, match=r"both embedding and head .* must be the same"):
        planned(TIED, embeddings="4x8g8", head="int8g64")


def test_a_plan_counts_every_matrix_once() -> None:
    plan = planned(UNTIED, embeddings="4x8g8", head="int8g64")
    assert plan.bytes_before == 2 * PARAMETERS and plan.other_parameters == 512
    assert plan.scheme == "2x8g8 (4), 4x8g8 (1), int8g64 (1)" and plan.method == "aqlm, rtn"
    assert plan.treatments["lm_head"] == parse_treatment("rtn:int8g64")
    assert Plan.from_json(plan.to_json()) == plan


def test_the_table_alone_can_be_quantized() -> None:
    plan = planned(TIED, r"model\.layers.*=keep", embeddings="4x8g8")
    assert [target.path for target in plan.quantized] == ["model.embed_tokens"]


def test_what_was_asked_for_and_cannot_be_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"model\.embed_tokens cannot be quantized with int4g60: 512 input features"):
        planned(TIED, embeddings="int4g60")
    scaled = [Layer("model.embed_tokens", 4096, 512, False, "table", "Scaled does more than look rows up"), *BLOCKS]
    with pytest.raises(PlanError, match="cannot be quantized with 4x8g8: Scaled does more"):
        planned(scaled, embeddings="4x8g8")


@pytest.mark.parametrize("rule", ["q_proj=3x8g8", r".*\.7\..*=keep"])
def test_a_rule_that_matches_nothing_is_an_error(rule: str) -> None:
    with pytest.raises(PlanError, match=r"--layer '.*' matches no layer; it must match a whole path"):
        planned(TIED, rule)


@pytest.mark.parametrize("layers", [TIED, UNTIED])
def test_a_rule_refines_tables_and_no_layers_of_blocks(layers: list[Layer]) -> None:
    found = words(planned(layers, "model.embed_tokens|.*q_proj|lm_head=3x8g8+int4g64r512"))
    outside = {layer.path for layer in layers if layer.kind != "linear"}
    assert {path for path, word in found.items() if word == "aqlm:3x8g8+int4g64r512"} == outside
    assert "it is for embeddings and heads" in found["model.layers.0.q_proj"]


@pytest.mark.parametrize("flag", ["layer", "skip", "only"])
def test_a_pattern_that_never_ends_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MATCHING_SECONDS", 0.1)
    started = time.process_time()
    with pytest.raises(UsageError, match=rf"--{flag} '\(\.\*\)\*x' takes too long to match; write it without repeats"):
        planned(TIED, "(.*)*x=keep") if flag == "layer" else planned(TIED, **{flag: ["(.*)*x"]})
    assert time.process_time() - started < 5
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert words(planned(TIED, r"(\w+\.)+q_proj=keep"))["model.layers.1.q_proj"] == r"kept by '(\w+\.)+q_proj'"


@pytest.mark.parametrize("rule", ["q_proj", "=2x8g8", "q_proj=", ""])
def test_a_rule_of_another_form_is_an_error(rule: str) -> None:
    with pytest.raises(UsageError, match="write REGEX=SCHEME, REGEX=METHOD:SCHEME or REGEX=keep"):
        parse_rule(rule)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"embeddings": "4x9"}, r"quantize\.embeddings`: scheme '4x9' is not understood"),
        ({"head": "rtn:2x8g8"}, r"quantize\.head`: method rtn takes uniform or level or refined schemes"),
        ({"head": "nobody:2x8g8"}, r"quantize\.head`: there is no method 'nobody'"),
        ({"layers": [{"match": "a"}]}, "the rule for 'a' needs a scheme, a method or keep: true"),
        ({"layers": [{"match": "a", "keep": True, "scheme": "2x8g8"}]}, "needs a scheme, a method or keep: true"),
        (
            {"layers": [{"match": "a", "method": "rtn"}]},
            "method rtn takes uniform or level or refined schemes such as int2g64, not 2x8g8",
        ),
        ({"layers": [{"match": "a", "method": "nobody"}]}, "there is no method 'nobody'"),
        ({"layers": [{"match": "a", "sheme": "2x8g8"}]}, "sheme"),
        ({"method": "rtn", "scheme": "int2g64", "aqlm": {"beam": 4}}, "settings of method aqlm"),
    ],
)
def test_settings_that_cannot_be_are_refused(section: dict[str, object], reason: str) -> None:
    with pytest.raises(AqlmError, match=reason):
        build_config(None, None, {"model": "any", "quantize": section})


def test_every_method_that_is_used_has_its_settings() -> None:
    section = {"method": "rtn", "scheme": "int2g64", "embeddings": "4x8g8", "aqlm": {"beam": 4}}
    config = build_config(None, None, {"model": "any", "quantize": section}).quantize
    assert config.settings is None and getattr(config.settings_of("aqlm"), "beam", None) == 4
    rule = {"match": "a", "scheme": "2x8g8"}
    mixed = QuantizeConfig.model_validate({"method": "rtn", "scheme": "int2g64", "layers": [rule]})
    assert getattr(mixed.settings_of("aqlm"), "beam", None) == 64


def test_flags_become_settings() -> None:
    flags = {"embeddings": "4x8g8", "head": None, "layer": ["a=keep", r"b=\=c=rtn:int4g32"], "bits": 3.0}
    assert as_settings(flags, QUANTIZE) == {
        "quantize": {
            "scheme": "3x8g8",
            "embeddings": "4x8g8",
            "layers": [
                {"match": "a", "keep": True},
                {"match": r"b=\=c", "scheme": "int4g32", "method": "rtn"},
            ],
        }
    }


def test_a_treatment_prints_as_it_is_read() -> None:
    for word in "aqlm:2x8g8", "rtn:int4g32":
        assert str(parse_treatment(word)) == word == str(parse_treatment(word.partition(":")[2]))
    with pytest.raises(UsageError, match="method aqlm takes additive or refined schemes such as 2x8g8, not int4g32"):
        Treatment("aqlm", parse_treatment("int4g32").scheme)
