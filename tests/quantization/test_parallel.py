from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import METHODS
from aqlm_cli.quantization.parallel import Compressed, Task, compress_all
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.seeds import generator
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.methods.gptq import GptqSettings
from aqlm_cli.spec.methods.information import InformationSettings
from aqlm_cli.spec.section import Section
from aqlm_cli.spec.treatment import parse_treatment
from aqlm_kernels import MATRIX_KINDS

SETTINGS = AqlmSettings(kmeans_iterations=3, rounds=3, ldlq_rounds=1, beam=4, final_beam=4)
SHAPES = {"q": (32, 64), "k": (16, 64), "up": (48, 64), "down": (64, 48), "wide": (8, 256)}


def task(path: str, weight: Tensor | None = None, scheme: str = "2x4g8") -> Task:
    draw = torch.Generator().manual_seed(len(path))
    rows, features = SHAPES[path]
    x = torch.randn(100, features, generator=draw) @ torch.randn(features, features, generator=draw)
    weight = torch.randn(rows, features, generator=draw) if weight is None else weight
    return Task(f"block.{path}", weight, LayerStatistics(x.T @ x / 100, 100), parse_treatment(scheme))


TASKS = [task(path) for path in SHAPES]


def settings_of(method: str) -> Section | None:
    settings: dict[str, Section] = {"aqlm": SETTINGS, "gptq": GptqSettings(), "information": InformationSettings()}
    return settings.get(method)


def compress(tasks: list[Task], seed: int = 0, threads: int = 1) -> Mapping[str, Compressed]:
    return compress_all(tasks, settings_of, seed, threads, lambda done: None)


def assert_same_bits(found: Mapping[str, Compressed], expected: Mapping[str, Compressed]) -> None:
    assert found.keys() == expected.keys()
    for path, one in expected.items():
        assert found[path].relative_error == one.relative_error
        for name, tensor in one.matrix.tensors().items():
            assert torch.equal(found[path].matrix.tensors()[name], tensor), (path, name)


# ---------------------------------------------------------------------------------------------------- what it rests on


def test_one_and_several_threads_give_the_same_bits() -> None:
    expected = compress(TASKS)
    for threads in 2, 4:
        assert_same_bits(compress(TASKS, threads=threads), expected)


def test_the_process_own_threads_do_not_show_in_the_result() -> None:
    expected = compress(TASKS)
    torch.set_num_threads(2)
    assert_same_bits(compress(TASKS, threads=2), expected)


def test_neither_order_nor_company_of_the_layers_shows_in_the_result() -> None:
    expected = compress(TASKS)
    assert_same_bits(compress(TASKS[::-1], threads=2), expected)
    alone: dict[str, Compressed] = {}
    for one in TASKS:
        alone.update(compress([one]))
    assert_same_bits(alone, expected)


def test_the_largest_are_started_first() -> None:
    begun: list[tuple[int, ...]] = []

    def noting(weight: Tensor, *rest: object) -> object:
        begun.append(tuple(weight.shape))
        return METHODS["aqlm"](weight, *rest)  # type: ignore[arg-type]

    compress_all(TASKS, settings_of, 0, 1, lambda done: None, {"aqlm": noting})  # type: ignore[dict-item]
    assert begun == [(8, 256), (48, 64), (64, 48), (32, 64), (16, 64)]


def test_randomness_comes_from_the_seed_and_the_name() -> None:
    weight = TASKS[0].weight
    renamed = Task("block.other", weight, TASKS[0].statistics, TASKS[0].treatment)
    found = compress([TASKS[0], renamed])
    assert not torch.equal(found["block.q"].matrix.tensors()["codes"], found["block.other"].matrix.tensors()["codes"])
    other = compress(TASKS[:1], seed=1)
    assert not torch.equal(found["block.q"].matrix.tensors()["codes"], other["block.q"].matrix.tensors()["codes"])


def test_generators_differ_by_seed_and_by_name_and_repeat() -> None:
    names = [(seed, name) for seed in (0, 1, 10**12) for name in ("a", "b", "1:a")]
    drawn = [torch.randint(2**62, (4,), generator=generator(*name)).tolist() for name in names]
    assert len({tuple(row) for row in drawn}) == len(names)
    assert drawn == [torch.randint(2**62, (4,), generator=generator(*name)).tolist() for name in names]
    # The same in every version of this program, or a run could not be repeated.
    assert generator(0, "model.layers.0").initial_seed() == 6950782316963839776


# ---------------------------------------------------------------------------------------------------- what it returns


def test_every_layer_is_reported_once_from_the_callers_thread() -> None:
    reported: list[tuple[str, int]] = []

    def done(one: Compressed) -> None:
        reported.append((one.path, threading.get_ident()))

    found = compress_all(TASKS, settings_of, 0, 2, done)
    assert sorted(path for path, _ in reported) == sorted(found) == sorted(task.path for task in TASKS)
    assert {thread for _, thread in reported} == {threading.get_ident()}


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-12, 3e-14, 6e4])
@pytest.mark.parametrize(("method", "scheme"), [("aqlm", "2x4g8"), ("rtn", "rtn:int2g16"), ("gptq", "gptq:int2g16")])
def test_the_error_reported_is_that_of_the_matrix_in_16_bits(size: float, method: str, scheme: str) -> None:
    tasks = [Task(one.path, size * one.weight, one.statistics, parse_treatment(scheme)) for one in TASKS]
    for layer, one in zip(tasks, (compress(tasks)[layer.path] for layer in tasks), strict=True):
        tensors = one.matrix.tensors()
        tensors |= {name: tensors[name].half() for name in tensors.keys() & {"codebooks", "scales"}}
        restored = type(one.matrix).from_tensors(tensors).dequantize(torch.float64)
        difference, moment = restored - layer.weight.double(), layer.statistics.second_moment.double()
        weight = layer.weight.double()
        expected = (difference @ moment * difference).sum() / (weight @ moment * weight).sum()
        assert one.relative_error == pytest.approx(float(expected), rel=1e-3) and 0 < expected < 1
        assert one.seconds > 0


def test_weights_that_no_pair_of_float16_numbers_reaches_are_refused_by_name() -> None:
    with pytest.raises(QuantizationError, match=r"^block\.q: its weights are too large .* --skip"):
        compress([task("q", 1e12 * TASKS[0].weight)])


CASES = [
    ("aqlm", "2x4g8"),
    ("rtn", "rtn:int2g16"),
    ("gptq", "gptq:int2g16"),
    ("information", "information:nf3tg16"),
    ("blockfloat", "blockfloat:bfp4g16"),
]


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_every_method_returns_a_matrix_of_a_kind_that_can_be_stored(method: str, scheme: str) -> None:
    matrix = compress([task("q", scheme=scheme)])["block.q"].matrix
    again = MATRIX_KINDS[matrix.kind].from_tensors(matrix.tensors())
    assert torch.equal(again.dequantize(), matrix.dequantize()) and again.bits() == matrix.bits()


def test_every_method_has_a_case_above() -> None:
    assert METHODS.keys() == {method for method, _ in CASES}


def test_the_callers_number_of_threads_is_as_it_was_after_a_refusal_too() -> None:
    torch.set_num_threads(2)
    compress(TASKS[:2], threads=2)
    assert torch.get_num_threads() == 2
    with pytest.raises(QuantizationError):
        compress([task("k", torch.full((16, 64), torch.nan))], threads=2)
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("scheme", ["aqlm:2x4g8", "rtn:int2g16", "gptq:int2g16"])
def test_a_weight_of_nan_is_refused_with_the_name_of_its_layer(scheme: str) -> None:
    tasks = [task(path, scheme=scheme) for path in SHAPES]
    tasks[1] = task("k", torch.full((16, 64), torch.nan), scheme)
    with pytest.raises(QuantizationError, match=r"^block\.k: the weight holds NaN"):
        compress(tasks, threads=2)


def test_after_a_refusal_nothing_else_is_started() -> None:
    begun: list[int] = []

    def refusing(weight: Tensor, *rest: object) -> object:
        begun.append(len(weight))
        time.sleep(0.1 if len(begun) > 1 else 0)
        raise QuantizationError("no")

    with pytest.raises(QuantizationError, match=r"^block\.wide: no"):
        compress_all(TASKS, settings_of, 0, 1, lambda done: None, {"aqlm": refusing})  # type: ignore[dict-item]
    assert len(begun) < len(TASKS)


def test_a_damaged_weight_is_named_before_the_layers_behind_it() -> None:
    behind = Task(
        "block.behind",
        torch.randn(64, 512),
        LayerStatistics(torch.full((512, 512), torch.nan), 1),
        parse_treatment("2x4g8"),
    )
    weight = torch.randn(*SHAPES["k"])
    weight[3, 5] = torch.nan
    with pytest.raises(QuantizationError, match=r"^block\.k: the weight holds NaN"):
        compress([behind, task("k", weight)])


def test_an_error_that_is_no_number_is_refused() -> None:
    broken = task("q")
    broken = Task(
        broken.path, broken.weight, LayerStatistics(torch.full((64, 64), torch.nan), 1), parse_treatment("int2g16")
    )
    with pytest.raises(QuantizationError, match=r"^block\.q: its error is nan"):
        compress([broken])
