from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aqlm_cli.errors import AqlmError, ConfigError, UsageError
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.quantize import QuantizeConfig
from aqlm_cli.spec.run_file import (
    FINETUNE_PRESETS,
    PRESETS,
    RENAMED,
    build_config,
    differences,
    dump_yaml,
    load_run_file,
    merge,
    preset_path,
)
from aqlm_cli.spec.schemes import AdditiveScheme, UniformScheme
from aqlm_cli.spec.target import parse_target

SHIPPED = sorted(preset_path("default").parent.glob("*.yaml"))


def run_file(directory: Path, text: str) -> Path:
    path = directory / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_the_default_preset_writes_out_every_default() -> None:
    defaults = RunConfig(model="any").model_dump(mode="json")
    assert {"model": "any", **load_run_file(preset_path("default"))} == defaults


def test_its_comments_write_out_the_defaults_of_the_other_methods() -> None:
    text = preset_path("default").read_text()
    sections = yaml.safe_load(re.sub(r"(?m)^  # (?= *\S)", "  ", text))["quantize"]
    methods = {name: method.settings for name, method in METHODS.items() if method.settings is not None}
    assert {name: sections[name] for name in methods} == {name: kind().model_dump() for name, kind in methods.items()}
    assert len(methods) > 1


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "default"])
def test_a_preset_names_only_what_it_changes(name: str) -> None:
    defaults = leaves(load_run_file(preset_path("default")))
    changed = leaves(load_run_file(preset_path(name)))
    assert changed and all(defaults[key] != value for key, value in changed.items())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_a_valid_run(path: Path) -> None:
    build_config(None, path, {"model": "any"})


def test_the_paper_preset_is_the_algorithm_of_its_authors() -> None:
    quantize = build_config("paper", None, {"model": "any"}).quantize
    assert quantize.settings == AqlmSettings(algorithm="reference", kmeans_iterations=100)
    fit = quantize.fit
    assert (fit.learning_rate, fit.learning_rate_unit, fit.batch, fit.epochs) == (1e-4, "absolute", 16, 5)
    assert (fit.sequences, fit.held_out, fit.patience) == (128, 16, 3)


def test_the_presets_of_pv_tuning_are_the_published_recipes() -> None:
    one, other = (build_config(name, None, {"model": "any"}).finetune for name in FINETUNE_PRESETS)
    for section in (one, other):
        assert (section.optimizer, section.learning_rate, section.embeddings) == ("lamb", 3e-4, True)
        assert (section.codes.share, section.warmup_steps, section.min_lr_ratio) == (0.01, 0, 1.0)
    assert (one.batch, one.codes.learning_rate, one.codes.trust_ratio) == (128, 1e-2, None)
    assert (other.batch, other.codes.learning_rate, other.codes.trust_ratio) == (256, 3e-3, 1e-2)


def test_a_written_run_file_reads_back_the_same(tmp_path: Path) -> None:
    flags = {"model": "any", "quantize": {"only": [r"model\.layers\.[0-6]\..*"], "fit": {"learning_rate": 1e-5}}}
    config = build_config("paper", None, flags)
    assert build_config(None, run_file(tmp_path, dump_yaml(config)), {}) == config


def values(schema: Mapping[str, Any], sections: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema allows, with any of the keys left out that have a default."""
    if "$ref" in schema:
        return values(sections[schema["$ref"].rpartition("/")[2]], sections)
    if "anyOf" in schema:
        return st.one_of(values(one, sections) for one in schema["anyOf"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "object":
        keys = {name: values(one, sections) for name, one in schema["properties"].items()}
        needed = {name: keys.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=keys)
    if schema["type"] == "array":
        return st.lists(values(schema["items"], sections), min_size=schema.get("minItems", 0), max_size=3)
    if schema["type"] == "number":
        open_below, least = "exclusiveMinimum" in schema, schema.get("exclusiveMinimum", schema.get("minimum"))
        return st.floats(least, schema.get("maximum"), exclude_min=open_below, allow_infinity=False)
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum"), schema.get("maximum")),
        "string": st.text(),
    }[schema["type"]]


SCHEMA = RunConfig.model_json_schema()
ANY_RUN = values(SCHEMA, SCHEMA["$defs"])
ADDITIVE = st.builds(AdditiveScheme, st.integers(1, 8), st.integers(1, 16), st.integers(1, 64)).map(str)
UNIFORM = st.builds(UniformScheme, st.integers(2, 8), st.integers(1, 1024)).map(str)
ANY_SCHEME = ADDITIVE | UNIFORM
DEVICES = st.from_regex(r"cpu|cuda(:(0|[1-9][0-9]?))?", fullmatch=True)
SIZES = st.none() | st.from_regex(r"[1-9][0-9]{0,3}(\.5)?( ?[KMGT]i?B)?", fullmatch=True)
BUDGETS = st.none() | st.from_regex(r"[1-9][0-9]?h([1-9]m)?", fullmatch=True)
TARGETS = st.sampled_from(
    [{}, {"size": "60MB", "among": ["2x8g8"]}, {"bits": 2.5}, {"kl": 0.1, "tables": []}, {"speed": 30.0}]
)

FORMATS = [
    {"activations": activations, "cache": cache, "sort_keys": sort_keys}
    for activations in (None, "int8t", "bfp6g16")
    for cache, sort_keys in ((None, False), ("bfp4g32", False), ("bfp4g32", True))
]


@cache
def method_settings(method: str) -> st.SearchStrategy[Any]:
    """The section of the method, under its name. Made once: to make a strategy takes longer than to draw from it."""
    section = METHODS[method].settings
    if section is None:
        return st.just({})
    schema = section.model_json_schema()
    return st.fixed_dictionaries({method: values(schema, schema.get("$defs", {}))})


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """What a valid run file may say. Beyond its types: a scheme is one of its method's, and a device,
    a size and a time have their forms."""
    drawn: dict[str, Any] = draw(ANY_RUN)
    drawn["device"] = draw(DEVICES)
    method = draw(st.sampled_from(["aqlm", "rtn", "gptq"]))
    scheme = draw(ADDITIVE if method == "aqlm" else UNIFORM)
    tables = {"embeddings": draw(st.none() | ANY_SCHEME), "head": draw(st.none() | ANY_SCHEME)}
    drawn.get("quantize", {}).pop("target", None)
    drawn = merge(drawn, {"quantize": {"target": draw(TARGETS)}})
    rules = [{"match": draw(st.text()), "scheme": draw(ANY_SCHEME)} for _ in "ab"]
    drawn = merge(drawn, {"quantize": {**tables, "layers": [*rules, {"match": draw(st.text()), "keep": True}]}})
    drawn = merge(drawn, {"quantize": draw(method_settings(method))})
    limits = {"max_memory": draw(SIZES), "max_disk": draw(SIZES)}
    budget = {"time_budget": draw(BUDGETS)}
    drawn = merge(drawn, {"eval_ppl": draw(st.sampled_from(FORMATS))})
    return merge(drawn, limits, {"quantize": {"method": method, "scheme": scheme}, "finetune": budget})


@hypothesis.settings(max_examples=40)
@given(settings())
def test_any_run_comes_back_from_its_file(tmp_path: Path, drawn: dict[str, Any]) -> None:
    config = RunConfig.model_validate(drawn)
    path = tmp_path / "run.yaml"
    path.write_bytes(dump_yaml(config).encode())
    assert build_config(None, path, {}) == config


def test_flags_beat_the_run_file_which_beats_the_preset(tmp_path: Path) -> None:
    path = run_file(tmp_path, "model: mine\nseed: 1\nquantize: {batch: 2, fit: {epochs: 7, sequences: 9}}\n")
    config = build_config("paper", path, {"seed": 5, "quantize": {"fit": {"epochs": 8}}})
    assert (config.model, config.seed) == ("mine", 5)
    assert (config.quantize.fit.epochs, config.quantize.fit.sequences) == (8, 9)
    assert (config.quantize.fit.batch, config.quantize.batch) == (16, 2)


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    path = run_file(tmp_path, "model: mine\nquantize: {scheme: 3x8g8}\n")
    config = build_config(None, path, {"model": None, "quantize": {"scheme": None}})
    assert (config.model, config.quantize.scheme) == ("mine", "3x8g8")


def test_merge_goes_into_sections_and_leaves_its_arguments_alone() -> None:
    first, second = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}, {"a": {"c": {"f": 3}}, "e": [3]}
    assert merge(first, second) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [3]}
    assert (first, second) == ({"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}, {"a": {"c": {"f": 3}}, "e": [3]})


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("quantize: {shceme: 2x8g8}", "quantize.shceme", "quantize.scheme"),
        ("scheme: 2x8g8", "scheme", "quantize.scheme"),
        ("calibrate: {final_beam: 4}", "calibrate.final_beam", "quantize.aqlm.final_beam"),
        ("quantise: {}", "quantise", "quantize"),
        ("eval-ppl: {dtype: float16}", "eval-ppl.dtype", "eval_ppl.dtype"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_valid_one(
    tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    path = run_file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_run_file(path)
    assert str(error.value) == f"{path}: unknown key `{key}`; nearest valid key is `{nearest}`"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    known = leaves(build_config(None, None, {"model": "tiny"}).model_dump())
    assert old not in known and any(f"{key}.".startswith(f"{new}.") for key in known)
    settings: Any = 1
    for name in reversed(old.split(".")):
        settings = {name: settings}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "tiny", **settings}))
    with pytest.raises(ConfigError) as error:
        load_run_file(path)
    assert str(error.value) == f"{path}: `{old}` is now called `{new}`; rename it there"


def test_a_value_of_an_earlier_version_is_refused_with_its_new_name(tmp_path: Path) -> None:
    path = run_file(tmp_path, "quantize: {aqlm: {algorithm: published}}")
    with pytest.raises(ConfigError) as error:
        load_run_file(path)
    new = "the value published of `quantize.aqlm.algorithm` is now called `reference`"
    assert str(error.value) == f"{path}: {new}; rename it there"


@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        (
            "{method: rtn, scheme: int2g64, aqlm: {beam: 4}}",
            "`quantize.aqlm`: settings of method aqlm, but quantize.method is rtn; remove them",
        ),
        ("{aqlm: {beam: 3}}", "`quantize.aqlm.beam`: Input should be 2, 4, 8, 16, 32, 64, 128 or 256, found 3"),
        (
            "{method: gptq, scheme: int4g64, gptq: {order: groups}}",
            "`quantize.gptq.order`: Input should be 'active' or 'none', found 'groups'",
        ),
        ("{gptq: {}}", "`quantize.gptq`: settings of method gptq, but quantize.method is aqlm; remove them"),
        ("{aqlm: 3}", "`quantize.aqlm`: needs a section of keys and values, or {}, found 3"),
        (
            "{method: awq}",
            "`quantize.method`: there is no method 'awq'; choose aqlm, rtn, gptq, blockfloat or information",
        ),
        ("{beam: 4}", "unknown key `quantize.beam`; nearest valid key is `quantize.aqlm.beam`"),
    ],
)
def test_settings_stand_in_the_section_of_their_method(tmp_path: Path, quantize: str, reason: str) -> None:
    path = run_file(tmp_path, f"model: any\nquantize: {quantize}\n")
    with pytest.raises(ConfigError) as error:
        build_config(None, path, {})
    assert str(error.value) == f"{path}: {reason}"


@pytest.mark.parametrize("given", [{"search": {}}, {"method": "rtn", "scheme": "int2g64", "rtn": {}}])
def test_a_section_that_no_method_has_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizeConfig.model_validate(given)


def test_a_flag_for_another_method_leaves_the_settings_of_the_first_behind(tmp_path: Path) -> None:
    path = run_file(tmp_path, "model: any\nquantize: {method: aqlm, aqlm: {beam: 4}}\n")
    assert build_config("fast", path, {}).quantize.settings == AqlmSettings.model_validate(
        {"beam": 4, "kmeans_iterations": 10, "rounds": 3, "ldlq_rounds": 1, "final_beam": 32}
    )
    config = build_config("fast", path, {"quantize": {"method": "rtn", "scheme": "int2g64"}})
    assert config.quantize.settings is None and "aqlm" not in config.model_dump()["quantize"]


def test_a_method_is_fitted_as_it_says_or_as_the_run_file_says() -> None:
    def epochs(**quantize: Any) -> int | None:
        return build_config(None, None, {"model": "any", "quantize": quantize}).quantize.fitting.epochs

    assert (epochs(), epochs(fit={"epochs": 0})) == (2, 0)
    rounded = {"method": "rtn", "scheme": "int2g64"}
    assert (epochs(**rounded), epochs(**rounded, fit={"epochs": 3})) == (0, 3)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("quantize: {fit: {batch: 0}}", ["quantize.fit.batch", "found 0"]),
        ("quantize: {batch: 2.5}", ["quantize.batch", "2.5"]),
        ("quantize: {batch: '2'}", ["quantize.batch", "'2'"]),
        ("quantize: {aqlm: {damping: .nan}}", ["quantize.aqlm.damping"]),
        ("quantize: {scheme: 2x8}", ["quantize.scheme", "2x8g8"]),
        ("quantize: {method: rtn}", ["method rtn", "int2g64", "not 2x8g8"]),
        ("quantize: {method: gptq}", ["method gptq", "int4g64", "not 2x8g8"]),
        ("quantize: {method: gptq, scheme: int4g64, gptq: {damping: 0}}", ["quantize.gptq.damping", "greater than 0"]),
        ("quantize: {scheme: int2g64}", ["method aqlm", "additive", "not int2g64"]),
        ("quantize: 3", ["quantize", "section", "found 3"]),
        ("bench:", ["bench", "section"]),
        ("eval_ppl: {data: wikitext2}", ["eval_ppl.data", "list", "'wikitext2'"]),
        ("eval_ppl: {data: [3]}", ["eval_ppl.data.0", "found 3"]),
        ("model: 3", ["model", "found 3"]),
        ("quantize: [", ["is not YAML"]),
        ("- quantize", ["keys and values"]),
        ("device: cuda:999", ["there is no device 'cuda:999'"]),
        ("device: cuda:٣", ["there is no device 'cuda:٣'"]),
    ],
)
def test_a_wrong_run_file_is_one_line_that_names_it(tmp_path: Path, text: str, fragments: list[str]) -> None:
    path = run_file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        build_config("fast", path, {"seed": 1, **({} if "model" in text else {"model": "any"})})
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert all(fragment in str(error.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: &a [x, y]\nquantize: {skip: [*a, *a]}", "aliases are not read"),
        ("model: &a [*a]", "aliases are not read"),
        ("model: !!python/object/apply:os.system ['false']", "could not determine a constructor"),
        ("model: 2001-99-99", "a value cannot be read"),
        ("model: !!bool maybe", "a value cannot be read"),
        ("seed: 0x" + "f" * 5000, "a value cannot be read"),
        ("[" * 5000, "a value cannot be read"),
        ("model: " + "x" * 200_000, "so it is no run file"),
    ],
    ids=["alias", "inside itself", "object", "date", "tag", "integer", "depth", "size"],
)
def test_yaml_that_no_run_file_needs_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(None, run_file(tmp_path, text), {})


def test_what_is_quoted_from_a_run_file_is_short(tmp_path: Path) -> None:
    for text in [f"{'k' * 50_000}: 1", f"model: m\nseed: {'v' * 50_000}"]:
        with pytest.raises(ConfigError) as caught:
            build_config(None, run_file(tmp_path, text), {})
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "flags", [{"eval_ppl": {"dtype": "int8"}}, {"quantize": {"scheme": "x"}}, {"quantize": {"method": "rtn"}}]
)
def test_a_wrong_flag_is_a_usage_error_even_beside_a_right_run_file(tmp_path: Path, flags: dict[str, Any]) -> None:
    path = run_file(tmp_path, "model: any\nquantize: {batch: 2}\neval_ppl: {dtype: float16}\n")
    with pytest.raises(UsageError, match=r"^flags: "):
        build_config(None, path, flags)


def test_without_a_model_the_line_says_how_to_name_one() -> None:
    with pytest.raises(UsageError, match="MODEL"):
        build_config("fast", None, {})


def test_missing_run_files_and_unknown_presets_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_run_file(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="default, fast, paper"):
        build_config("slow", None, {"model": "any"})


def test_yaml_may_write_a_rate_without_a_dot(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-4") == "1e-4", "YAML 1.1 has come to read this as a number: Rate may be strict"
    path = run_file(tmp_path, "model: any\nquantize: {fit: {learning_rate: 1e-4}}\n")
    assert build_config(None, path, {}).quantize.fit.learning_rate == 1e-4


def test_differences_name_both_values_and_keep_to_their_section() -> None:
    there = build_config(None, None, {"model": "any"})
    here = build_config(None, None, {"model": "other", "quantize": {"scheme": "3x8g8", "fit": {"epochs": 1}}})
    assert differences(there, here, "") == ["model: any there, other here"]
    assert differences(there, here, "quantize") == [
        "quantize.scheme: 2x8g8 there, 3x8g8 here",
        "quantize.fit.epochs: None there, 1 here",
    ]
    assert differences(there, here, "calibrate") == []


def test_of_two_methods_the_method_is_the_difference() -> None:
    there = build_config(None, None, {"model": "any"})
    here = build_config(None, None, {"model": "any", "quantize": {"method": "rtn", "scheme": "int2g64"}})
    lines = ["quantize.method: {} there, {} here", "quantize.scheme: {} there, {} here"]
    assert differences(there, here, "quantize") == [lines[0].format("aqlm", "rtn"), lines[1].format("2x8g8", "int2g64")]
    assert differences(here, there, "quantize") == [lines[0].format("rtn", "aqlm"), lines[1].format("int2g64", "2x8g8")]


def test_where_a_run_is_computed_is_no_difference() -> None:
    there = build_config(None, None, {"model": "any"})
    assert differences(there, build_config(None, None, {"model": "any", "threads": 3, "device": "cuda"}), "") == []


def test_malformed_flags_exit_with_2_and_all_else_with_1() -> None:
    family = AqlmError.__subclasses__()
    assert UsageError in family and ConfigError in family
    assert {error.__name__: error.exit_status for error in family if error.exit_status != 1} == {"UsageError": 2}


@pytest.mark.parametrize("text", ["quantize: {search: {rounds: {a: 1}}}", "quantize: {search: {a: {b: 1}}}"])
def test_what_stands_below_a_key_of_an_earlier_version_hides_no_new_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"`quantize\.search(\.rounds)?` is now called `quantize\.aqlm(\.rounds)?`"):
        load_run_file(run_file(tmp_path, text))


def test_all_keys_of_an_earlier_version_are_named_at_once_and_a_section_that_moved_only_once(tmp_path: Path) -> None:
    path = run_file(
        tmp_path, "quantize: {checkpoint: null, search: {recipe: ldlq, beam: 8, rounds: 2}}\nfinetune: {keep_every: 2}"
    )
    with pytest.raises(ConfigError) as error:
        load_run_file(path)
    assert str(error.value) == (
        f"{path}: `quantize.checkpoint` is now called `quantize.import_from`; "
        "`quantize.search.recipe` is now called `quantize.aqlm.algorithm`; `quantize.search` is now called "
        "`quantize.aqlm`; `finetune.keep_every` is now called `finetune.save_every`; rename them there"
    )


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        ("{method: [aqlm]}", "`quantize.method`: Input should be a valid string, found ['aqlm']"),
        ("{method: null, aqlm: {beam: 8}}", "`quantize.method`: Input should be a valid string, found None"),
        (
            "{method: awq, awq: {bits: 3}}",
            "`quantize.method`: there is no method 'awq'; choose aqlm, rtn, gptq, blockfloat or information",
        ),
        (
            "{method: fit, fit: {epochs: 1}}",
            "`quantize.method`: there is no method 'fit'; choose aqlm, rtn, gptq, blockfloat or information",
        ),
        ("{method: rtn, scheme: int2g64, rtn: {}}", "`quantize.rtn`: method rtn has no settings; remove the section"),
        ("{rtn: {}}", "`quantize.rtn`: settings of method rtn, but quantize.method is aqlm; remove them"),
        ("{aqlm.beam: 8}", "`quantize.aqlm.beam`: is no setting and no method; remove it, or write a key of a section"),
    ],
)
@pytest.mark.parametrize("preset", [None, "paper"])
def test_a_method_that_cannot_be_is_what_the_line_names(
    tmp_path: Path, quantize: str, words: str, preset: str | None
) -> None:
    path = run_file(tmp_path, f"model: any\nquantize: {quantize}\n")
    with pytest.raises(ConfigError) as error:
        build_config(preset, path, {})
    assert str(error.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("text", ["quantize: {batch: 2}\nquantize: {batch: 4}", "quantize: {batch: 2, batch: 4}"])
def test_a_key_that_comes_twice_is_refused_and_not_forgotten(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"the key (quantize|batch) comes twice; write it once .* line \d"):
        load_run_file(run_file(tmp_path, text))


def test_a_count_that_no_tensor_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="less than or equal to 1000000000"):
        build_config(None, None, {"model": "any", "calibrate": {"sequence_length": 10**30}})


def test_a_preset_without_settings_for_finetuning_is_no_recipe() -> None:
    with pytest.raises(UsageError, match="preset fast has no settings for finetuning; choose pv-tuning or"):
        build_config(None, None, {"model": "any"}, recipe="fast")


@pytest.mark.parametrize(("text", "kl"), [("0.1", 0.1), ("1e-3", 0.001), ("5.", 5.0), (".5", 0.5), ("2E+1", 20.0)])
def test_the_flag_of_a_divergence_takes_any_positive_number(text: str, kl: float) -> None:
    assert parse_target(f"kl={text}") == kl


@pytest.mark.parametrize(
    "text", ["kl=", "kl=0", "kl=0e5", "kl=1e", "kl=-1", "kl=nan", "kl=.", "kl=1_0", "KL=1", "1", ""]
)
def test_the_flag_of_a_divergence_takes_nothing_else(text: str) -> None:
    with pytest.raises(UsageError, match=r"write kl=NUMBER such as kl=0\.1"):
        parse_target(text)
