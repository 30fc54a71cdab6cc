from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.walks import states_of_blocks, walk_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError, PlanError, QuantizationError, StorageError
from aqlm_cli.events import Advanced, BlockQuantized, Event, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import find_blocks, linears
from aqlm_cli.models.hidden_states import Activations, run_block
from aqlm_cli.models.received_attention import received_attention
from aqlm_cli.pipeline import block_work
from aqlm_cli.pipeline.job import Job, make_job
from aqlm_cli.pipeline.order import prepare
from aqlm_cli.pipeline.stage_reports import QuantizeReport
from aqlm_cli.pipeline.stages import quantize as stage
from aqlm_cli.pipeline.stages.calibrate import calibrate
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.pipeline.stages.quantize import quantize
from aqlm_cli.quantization import block_inputs, parallel
from aqlm_cli.quantization.block_inputs import CalibrationPass
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.quantization.training.block import fit_block, tuned_parameters
from aqlm_cli.runs.artifact import Artifact, open_artifact
from aqlm_cli.runs.directory import open_run, read_run
from aqlm_cli.runs.files import load_tensors, read_metadata, save_tensors
from aqlm_cli.runs.stages import CALIBRATE, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.plan import Plan
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import MATRIX_KINDS, AdditiveLinear, Matrix, choose, smallest

WINDOWS, LENGTH = 12, 32
QUICK = {"kmeans_iterations": 2, "rounds": 2, "ldlq_rounds": 1, "beam": 2, "final_beam": 2}
FIT = {"epochs": 1, "sequences": 4, "held_out": 3, "batch": 2}


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text()


def write_text() -> None:
    Path("a.txt").write_text("".join(f"{number} times {number} is {number**2}. " for number in range(40)))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine the same, and near enough to what the tests compute themselves."""
    monkeypatch.setattr(block_inputs, "compute_dtype", lambda device: torch.float32)


def settings(model: Path, **section: Any) -> RunConfig:
    given = {"scheme": "2x4g8", "statistics_sequences": 8, "batch": 4, "fit": FIT, **section}
    if section.get("method", "aqlm") == "aqlm":
        given = {"aqlm": QUICK, **given}
    calibration = {"data": f"a.txt:{WINDOWS}", "sequence_length": LENGTH, "statistics_sequences": 2}
    return build_config(None, None, {"model": str(model), "calibrate": calibration, "quantize": given})


def run(
    config: RunConfig, directory: str = "run", overwrite: bool = False, events: list[Event] | None = None
) -> QuantizeReport:
    calibrate(make_job(config, Path(directory)))
    return quantize(
        make_job(config, Path(directory), overwrite=overwrite, emit=([] if events is None else events).append)
    )


def job_in(directory: Path) -> Job:
    return make_job(read_run(directory).config, directory)


def quantized(directory: str = "run") -> Artifact:
    return open_artifact(Path(directory) / "quantized", "quantized")


def files(directory: str = "run") -> dict[str, bytes]:
    folder = Path(directory) / "quantized"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def matrices(directory: str = "run") -> dict[str, Matrix]:
    """Every compressed matrix of all blocks, by the path of its layer."""
    found: dict[str, Matrix] = {}
    for path in sorted((Path(directory) / "quantized").glob("block-*.safetensors")):
        for name, kind in json.loads(read_metadata(path)["kinds"]).items():
            found[name] = MATRIX_KINDS[kind].from_tensors(load_tensors(path, f"{name}."))
    return found


def vectors(directory: str = "run") -> dict[str, Tensor]:
    """What the blocks' files hold beside matrices."""
    found: dict[str, Tensor] = {}
    for path in (Path(directory) / "quantized").glob("block-*.safetensors"):
        names = tuple(f"{name}." for name in json.loads(read_metadata(path)["kinds"]))
        own = {name: tensor for name, tensor in load_tensors(path).items() if name.endswith(".bias")}
        rest = {name: tensor for name, tensor in load_tensors(path).items() if not name.startswith(names)}
        found.update(own | rest)
    return found


def restored(model: Path, directory: str = "run") -> nn.Module:
    """The original network with everything that the run holds put into it, by this test's own hand."""
    network = load_network(resolve(str(model)), torch.float32)
    for path, matrix in matrices(directory).items():
        network.get_submodule(path).weight.data = matrix.dequantize()
    for name, values in vectors(directory).items():
        network.get_parameter(name).data = values
    return network


def windows() -> Tensor:
    """Of the calibration, in the order in which quantization takes them."""
    ids = load_file("run/calibration/windows.safetensors")["ids"].long()
    return ids[torch.randperm(len(ids), generator=generator(0, "windows"))]


# ------------------------------------------------------------------------------------------------------- end to end


# Without and with biases, and blocks of two kinds; tests/models/test_families.py takes every family the same way.
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_a_model_goes_from_text_to_a_checkpoint_that_computes_alike(
    family: str, tmp_path: Path, in_float32: None
) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    events: list[Event] = []
    report = run(settings(model), events=events)
    network = load_network(resolve(str(model)), torch.float32)
    blocks = find_blocks(network)
    paths = [
        path for prefix, block in zip(blocks.paths, blocks.modules, strict=True) for path in linears(block, prefix)
    ]
    assert sorted(matrices()) == sorted(paths)
    assert report.layers == len(paths) and report.mean_relative_error < 0.5

    ids = tiny_models.token_ids(length=LENGTH)
    with torch.no_grad():
        found, original = restored(model)(ids).logits, network(ids).logits
    pack(job_in(Path("run")))
    packed = load_network(resolve("run/packed"), torch.float32)
    with torch.no_grad():
        assert (packed(ids).logits - found).norm() < 1e-3 * found.norm()
    assert (found - original).norm() > 0.01 * original.norm()  # so the comparison means something
    assert all(event.relative_error < 0.7 for event in events if isinstance(event, BlockQuantized))

    done = [event for event in events if isinstance(event, LayerQuantized)]
    assert sorted(event.path for event in done) == sorted(paths)
    assert [event.index for event in events if isinstance(event, BlockQuantized)] == list(range(len(blocks.paths)))
    assert events[0] == StageStarted("check", len(blocks.paths), "block")
    assert StageStarted("quantize", len(blocks.paths), "block") in events
    assert events[-1] == Advanced("quantize", len(blocks.paths))


@pytest.mark.parametrize(("method", "scheme"), [("aqlm", "1x4g16"), ("rtn", "int2g16"), ("gptq", "int2g16")])
def test_every_method_is_served(method: str, scheme: str, tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    report = run(settings(model, method=method, scheme=scheme))
    assert (report.method, report.scheme, report.layers) == (method, scheme, 14)
    weights = sum(matrix.dequantize().numel() for matrix in matrices().values())
    assert report.stored_bits == pytest.approx(sum(matrix.bits() for matrix in matrices().values()) / weights)


def test_grids_of_rtn_are_fitted_where_the_run_file_asks_and_never_otherwise(tmp_path: Path, in_float32: None) -> None:
    model = tiny_models.save("opt", tmp_path / "model")
    rounded = {"method": "rtn", "scheme": "int3g16"}
    run(settings(model, **rounded, fit={**FIT, "epochs": None}))
    original = load_network(resolve(str(model)), torch.float32)
    for path, matrix in matrices().items():
        weight = original.get_submodule(path).weight
        again = rtn.quantize(weight, LayerStatistics(torch.eye(1), 1), UniformScheme(3, 16), torch.Generator(), None)
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in matrix.tensors().items()), path
    for name, values in vectors().items():
        assert torch.equal(values, original.get_parameter(name).half().float())

    events: list[Event] = []
    run(settings(model, **rounded, fit={**FIT, "epochs": 2}), "fitted", events=events)
    assert all(event.gain > 0 for event in events if isinstance(event, BlockQuantized))
    unfitted = matrices()
    for path, matrix in matrices("fitted").items():
        tensors, before = matrix.tensors(), unfitted[path].tensors()
        assert not torch.equal(tensors["scales"], before["scales"]) and tensors["scales"].dtype == torch.float16
        assert all(torch.equal(tensors[name], before[name]) for name in tensors.keys() - {"scales"})


def test_the_recipe_of_the_paper_is_served_and_leaves_more_error(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    ours = run(settings(model))
    theirs = run(settings(model, aqlm={**QUICK, "algorithm": "reference", "adam_steps": 5}), "other")
    assert ours.mean_relative_error < theirs.mean_relative_error < 1


# --------------------------------------------------------------------------------------------------------- what it does


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a text, a model and the run of the settings above; its paths are relative, to be copied."""
    directory = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        write_text()
        run(settings(tiny_models.save("llama", Path("model"))))
    return directory


@pytest.fixture
def finished(made: Path, text: None) -> Path:
    """The model of a run that is finished: `run` in the working directory."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return Path("model")


def whole(states: Activations) -> Tensor:
    return states[torch.arange(len(states))]


class Spy:
    """Notes what the pass knows of every block: its statistics, and the states before and after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statistics: list[dict[str, LayerStatistics]] = []
        self.entering: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.leaving: list[Tensor] = []
        self.counts: list[tuple[int, int, int]] = []
        measure, advance = CalibrationPass.measure, CalibrationPass.advance

        def measuring(work: CalibrationPass, block: nn.Module, paths: Any) -> dict[str, LayerStatistics]:
            self.entering.append(whole(work.hidden))
            self.counts.append((len(work.hidden), work.measured, work.fitted))
            self.statistics.append(measure(work, block, paths))
            self.targets.append(whole(work.targets))
            return self.statistics[-1]

        def advancing(work: CalibrationPass, block: nn.Module) -> float:
            error = advance(work, block)
            self.leaving.append(whole(work.targets))
            return error

        monkeypatch.setattr(CalibrationPass, "measure", measuring)
        monkeypatch.setattr(CalibrationPass, "advance", advancing)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])  # with biases; with other arguments for each block
def test_each_block_is_quantized_on_what_the_quantized_ones_before_it_put_out(
    family: str, tmp_path: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    spy = Spy(monkeypatch)
    run(settings(model))
    count = spy.counts[0][0]
    ours = states_of_blocks(restored(model), windows()[:count])
    theirs = states_of_blocks(load_network(resolve(str(model)), torch.float32), windows()[:count])
    torch.testing.assert_close(spy.entering[0], theirs[0])
    for index, (entering, leaving) in enumerate(zip(spy.entering, spy.leaving, strict=True)):
        bound = 1e-4 * float(ours[index + 1].abs().max())
        torch.testing.assert_close(entering, ours[index], rtol=0, atol=bound)
        torch.testing.assert_close(leaving, ours[index + 1], rtol=0, atol=bound)
    assert (spy.entering[1] - theirs[1]).norm() > 0.01 * theirs[1].norm()  # so the comparison means something


def test_targets_are_what_the_original_block_makes_of_the_same_inputs(
    llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    run(settings(llama))
    network = load_network(resolve(str(llama)), torch.float32)
    ids = windows()[: len(spy.entering[0])]
    walk = walk_of(network, ids)
    for index, block in enumerate(find_blocks(network).modules):
        expected, _ = run_block(block, walk.given(index, ids, spy.entering[index], {}), torch.float32)
        torch.testing.assert_close(spy.targets[index], expected, rtol=0, atol=1e-4)


def test_statistics_are_of_the_measured_sequences_and_shared_where_inputs_are(
    llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    run(settings(llama))
    network = load_network(resolve(str(llama)), torch.float32)
    _, measured, _ = spy.counts[0]
    ids = windows()[:measured]
    walk = walk_of(network, ids)
    for index, block in enumerate(find_blocks(network).modules):
        found = spy.statistics[index]
        q, k, v = (found[f"self_attn.{name}_proj"].second_moment for name in "qkv")
        assert k is v and k is not q
        assert found["mlp.gate_proj"].second_moment is found["mlp.up_proj"].second_moment
        inputs = dict[str, Tensor]()
        for path in "mlp.down_proj", "self_attn.q_proj":
            block.get_submodule(path).register_forward_pre_hook(
                lambda _, given, path=path, inputs=inputs: inputs.update({path: given[0].flatten(0, 1).double()})
            )
        with received_attention(block) as received:
            run_block(block, walk.given(index, ids, spy.entering[index][:measured], {}), torch.float32)
        x, entering = inputs["mlp.down_proj"], inputs["self_attn.q_proj"]
        assert found["mlp.down_proj"].tokens == len(x) == measured * LENGTH
        weighed = entering * received["self_attn.v_proj"].double()[:, None]
        for moment, wanted in (
            (found["mlp.down_proj"].second_moment, x.T @ x / len(x)),
            (q, entering.T @ entering / len(x)),
            (v, weighed.T @ entering / len(x)),
        ):
            torch.testing.assert_close(moment.double(), wanted, rtol=1e-3, atol=1e-5)


def test_tokens_count_alike_where_the_run_file_says_so(
    llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    run(settings(llama, token_weights="none"))
    for found in spy.statistics:
        q, k, v = (found[f"self_attn.{name}_proj"].second_moment for name in "qkv")
        assert q is k is v


def test_the_errors_told_are_those_of_the_states(
    llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, events = Spy(monkeypatch), list[Event]()
    run(settings(llama, fit={**FIT, "epochs": 4, "sequences": 6}), events=events)
    _, _, fitted = spy.counts[0]
    for index, event in enumerate(event for event in events if isinstance(event, BlockQuantized)):
        output, target = spy.leaving[index][:fitted].double(), spy.targets[index][:fitted].double()
        assert event.relative_error == pytest.approx(
            float((output - target).norm() ** 2 / target.norm() ** 2), rel=1e-4
        )
        assert 0 < event.gain < 1


def test_the_errors_of_layers_after_fitting_are_those_of_what_is_stored(
    llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    keeping = [{"match": ".*k_proj", "keep": True}]  # which shares its inputs with layers that are quantized
    run(settings(llama, layers=keeping, fit={**FIT, "epochs": 4, "sequences": 8}))
    original, stored = load_network(resolve(str(llama)), torch.float32), matrices()
    told = quantized().result("layers")
    assert told.keys() == stored.keys() and len(told) == 6 * len(find_blocks(original).paths)
    assert any(abs(one["fitted_relative_error"] / one["relative_error"] - 1) > 1e-4 for one in told.values())
    for index, block in enumerate(find_blocks(original).paths):
        for path, statistics in spy.statistics[index].items():
            name = f"{block}.{path}"
            if path == "self_attn.k_proj":
                continue
            weight, moment = original.get_parameter(f"{name}.weight").double(), statistics.second_moment.double()
            difference = stored[name].dequantize().double() - weight
            error = float((difference @ moment * difference).sum() / (weight @ moment * weight).sum())
            assert told[name]["fitted_relative_error"] == pytest.approx(error, rel=1e-4)
    run(settings(llama, fit={**FIT, "epochs": 0}), "unfitted")
    unfitted = quantized("unfitted").result("layers")
    assert not any("fitted_relative_error" in layer for layer in unfitted.values())


@pytest.fixture
def loud_and_quiet(llama: Path, tmp_path: Path) -> Path:
    """The same network: its values are 2^-24 of the ordinary ones, and what reads them makes up for it."""
    directory = shutil.copytree(llama, tmp_path / "loud-and-quiet")
    tensors = load_file(llama / "model.safetensors")
    for name in tensors:
        factor = {"v_proj": 2.0**-24, "o_proj": 2.0**24}.get(name.split(".")[-2], 1.0)
        tensors[name] = factor * tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_the_errors_reported_are_those_of_the_packed_file(
    loud_and_quiet: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: dict[str, parallel.Task] = {}

    def noting(given: list[parallel.Task], *rest: Any) -> Any:
        tasks.update({task.path: task for task in given})
        return parallel.compress_all(given, *rest)

    monkeypatch.setattr(block_work, "compress_all", noting)
    run(settings(loud_and_quiet, fit={**FIT, "epochs": 0}))
    packed = load_file(pack(job_in(Path("run"))).directory / "model.safetensors")
    reported = quantized().manifest.results["layers"]
    assert reported.keys() == tasks.keys()
    for path, task in tasks.items():
        codes, books = packed[f"{path}.codes"].long() % 16, packed[f"{path}.codebooks"].double()
        sums = sum(books[m, codes[..., m], 0] for m in range(2)).flatten(1)  # type: ignore[union-attr]
        difference = packed[f"{path}.scales"].double().flatten(1) * sums - task.weight.double()
        moment, weight = task.statistics.second_moment.double(), task.weight.double()
        error = float((difference @ moment * difference).sum() / (weight @ moment * weight).sum())
        assert reported[path]["relative_error"] == pytest.approx(error, rel=0.01)


def test_weights_beyond_the_range_of_float16_are_quantized_fitted_and_packed_as_ordinary_ones(
    llama: Path, loud_and_quiet: Path, in_float32: None
) -> None:
    errors = []
    for model in (llama, loud_and_quiet):
        run(settings(model, fit={**FIT, "epochs": 2}), f"run-{model.name}")
        packed = pack(job_in(Path(f"run-{model.name}"))).directory
        wanted = load_network(resolve(str(llama)), torch.float32)(tiny_models.token_ids()).logits
        found = load_network(resolve(str(packed)), torch.float32)(tiny_models.token_ids()).logits
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_fitting_lowers_the_error_of_every_block(llama: Path) -> None:
    errors = []
    for epochs in 0, 4:
        events: list[Event] = []
        run(settings(llama, fit={**FIT, "epochs": epochs, "sequences": 8}), f"run-{epochs}", events=events)
        errors.append([event.relative_error for event in events if isinstance(event, BlockQuantized)])
    assert all(after < before for before, after in zip(*errors, strict=True))


def test_what_is_stored_is_what_16_bits_can_hold(finished: Path) -> None:
    for name, tensor in vectors().items():
        assert torch.equal(tensor, tensor.half().float()), name
    for path, matrix in matrices().items():
        for name, tensor in matrix.tensors().items():
            assert torch.equal(tensor.float(), tensor.half().float()), f"{path}.{name}"
    original = load_network(resolve(str(finished)), torch.float32)
    assert vectors().keys() == {
        name for name, values in original.model.layers.named_parameters(prefix="model.layers") if values.ndim == 1
    }
    assert any(not torch.equal(values, original.get_parameter(name).half()) for name, values in vectors().items())


@pytest.mark.parametrize("choice", [{"only": [r".*\.1\.mlp\..*"]}, {"skip": ["lm_head", r".*\.0\..*", r".*attn.*"]}])
def test_layers_that_are_not_chosen_stay_as_they_are(
    choice: dict[str, Any], llama: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    run(settings(llama, **choice))
    assert matrices().keys() == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert files().keys() == {"block-001.safetensors"}
    theirs = states_of_blocks(load_network(resolve(str(llama)), torch.float32), windows()[: spy.counts[0][0]])
    torch.testing.assert_close(spy.entering[1], theirs[1], rtol=0, atol=5e-3)  # norms are stored in 16 bits
    assert spy.statistics[0] == {} and spy.statistics[1].keys() == {
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    torch.testing.assert_close(spy.leaving[1], states_of_blocks(restored(llama), windows()[:11])[2], rtol=0, atol=5e-3)


def test_blocks_behind_the_last_chosen_layer_are_not_run(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, events = Spy(monkeypatch), list[Event]()
    run(settings(llama, only=[r"model\.layers\.0\..*q_proj"]), events=events)
    assert len(spy.entering) == 1
    assert files().keys() == {"block-000.safetensors"}
    assert StageStarted("quantize", 1, "block") in events


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("2x8g8", None),
        ("1x12g8", "cpu-gather: no fast kernel for 1x12g8 on this machine; schemes of 8 bits a code have one"),
    ],
)
def test_a_plan_says_what_will_multiply_and_whether_that_is_slow(llama: Path, scheme: str, kernel: str | None) -> None:
    assert prepare(make_job(settings(llama, scheme=scheme), Path("run")))[1].kernel == (
        kernel or choose(smallest(2, 256, 8), torch.device("cpu")).name
    )
    assert prepare(make_job(settings(llama, method="rtn", scheme="int4g16"), Path("run")))[1].kernel is None


def test_a_plan_tells_what_will_be_done_without_doing_it(llama: Path) -> None:
    config = settings(llama, only=[r".*mlp.*"])
    plan = prepare(make_job(config, Path("run")))[1]
    report = run(config)
    assert (plan.layers, plan.stored_bits, plan.bytes_after) == (report.layers, report.stored_bits, report.bytes_after)
    inside = [path for path, _ in plan.skipped if path.startswith("model.layers.")]
    assert len(inside) == 8 and plan.layers == 6
    stored = Plan.from_json(quantized().manifest.results["plan"])
    assert {target.path for target in stored.quantized} == set(matrices())


# --------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(
    ("statistics_sequences", "fit", "counts"),
    [
        (8, FIT, (11, 8, 4)),
        (100, FIT, (12, 9, 4)),  # what is held out is held out first
        (8, {**FIT, "held_out": 100}, (11, 8, 4)),  # at most a quarter of all
        (3, {**FIT, "sequences": 100}, (6, 3, 3)),
        (8, {**FIT, "epochs": 0}, (8, 8, 4)),
    ],
)
def test_where_sequences_are_few_fewer_are_measured_and_fitted_to(
    statistics_sequences: int,
    fit: dict[str, Any],
    counts: tuple[int, int, int],
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(monkeypatch)
    run(settings(llama, statistics_sequences=statistics_sequences, fit=fit, only=[r".*0.*q_proj"]))
    assert spy.counts == [counts]


def few_windows(model: Path, count: int) -> RunConfig:
    given = settings(model).model_dump(mode="json")
    return build_config(None, None, {**given, "calibrate": {**given["calibrate"], "data": f"a.txt:{count}"}})


def test_one_sequence_cannot_be_held_out_and_that_is_said(llama: Path) -> None:
    events: list[Event] = []
    run(few_windows(llama, 1), events=events)
    assert [event.message for event in events if isinstance(event, Warned)] == [
        "the calibration set has one sequence, so none is held out and blocks are not fitted; add text"
    ]
    assert {event.gain for event in events if isinstance(event, BlockQuantized)} == {0.0}


def test_of_two_sequences_one_is_held_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    run(few_windows(llama, 2))
    assert spy.counts == [(2, 1, 1)] * len(spy.counts) and spy.counts


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`unreached(text)`: no text reaches the layers with this in their path."""

    def leave(text: str) -> None:
        def without(*arguments: Any) -> dict[str, LayerStatistics]:
            found = measure(*arguments)
            return {path: statistics for path, statistics in found.items() if text not in path}

        measure = CalibrationPass.measure
        monkeypatch.setattr(CalibrationPass, "measure", without)

    return leave


def test_a_layer_that_no_text_reaches_stays_as_it_is(llama: Path, unreached: Callable[[str], None]) -> None:
    events: list[Event] = []
    unreached("q_proj")
    report = run(settings(llama), events=events)
    assert [event.message for event in events if isinstance(event, Warned)] == [
        f"model.layers.{block}.self_attn.q_proj stays in 16 bits: no text reaches it; add text to quantize it"
        for block in range(2)
    ]
    plan = Plan.from_json(quantized().manifest.results["plan"])
    assert {target.path: target.reason for target in plan.skipped if target.kind == "linear"} == {
        f"model.layers.{block}.self_attn.q_proj": "no text reaches it" for block in range(2)
    }
    assert report.layers == len(matrices()) == 12
    pack(job_in(Path("run")))
    packed, original = (
        load_network(resolve("run/packed"), torch.float32),
        load_network(resolve(str(llama)), torch.float32),
    )
    kept = packed.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert torch.equal(kept, original.get_submodule("model.layers.1.self_attn.q_proj").weight.half().float())


def test_text_that_reaches_no_layer_is_refused(llama: Path, unreached: Callable[[str], None]) -> None:
    unreached("proj")
    with pytest.raises(QuantizationError, match="nothing is quantized: no text reaches it"):
        run(settings(llama))
    assert not Path("run/quantized").exists()


def test_a_calibration_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    calibrate(make_job(settings(llama), Path("run")))
    manifest = Path("run/calibration/manifest.json")
    made = json.loads(manifest.read_text())
    made["parents"]["model"] = "sha256:another"
    manifest.write_text(json.dumps(made))
    with pytest.raises(ArtifactError, match="was made from another model than"):
        quantize(make_job(settings(llama), Path("run")))


def test_held_out_sequences_are_not_fitted_to(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[list[int], list[int]]] = []

    def noting(block: nn.Module, data: Any, training: Tensor, held_out: Tensor, *rest: Any) -> tuple[float, float]:
        called.append((training.tolist(), held_out.tolist()))
        return fit_block(block, data, training, held_out, *rest)

    monkeypatch.setattr(stage, "fit_block", noting)
    run(settings(llama))
    assert called == [([0, 1, 2, 3], [8, 9, 10])] * 2


# --------------------------------------------------------------------------------------------------- again, and reuse


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_command_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    run(settings(model))
    run(settings(model), "again")
    assert files() == files("again")
    assert quantized().digest == quantized("again").digest


def test_the_number_of_threads_that_compress_does_not_show(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of torch outside of it may differ by their number of threads, so those stay."""
    compress_all = parallel.compress_all
    counts: list[int] = []

    def alone(tasks: Any, settings_of: Any, seed: int, threads: int, done: Any) -> Any:
        counts.append(threads)
        return compress_all(tasks[::-1], settings_of, seed, 1 if threads > 1 else 2, done)

    monkeypatch.setattr(block_work, "compress_all", alone)
    run(settings(finished), "again")
    assert len(counts) == 2
    assert files() == files("again")


def test_another_seed_gives_other_codes(finished: Path) -> None:
    config = settings(finished).model_copy(update={"seed": 1})
    run(config, "again")
    assert files() != files("again")


def test_what_is_there_with_the_same_settings_is_reused(llama: Path) -> None:
    report = run(settings(llama))
    written = Path("run/quantized/manifest.json").stat().st_mtime_ns
    events: list[Event] = []
    assert run(settings(llama), events=events) == report
    assert Path("run/quantized/manifest.json").stat().st_mtime_ns == written
    (event,) = events
    assert isinstance(event, Noted) and "exists already" in event.message


def test_other_settings_are_refused_by_name_and_redone_on_request(finished: Path) -> None:
    before = files()
    with pytest.raises(ArtifactError, match=r"quantize\.scheme: 2x4g8 there, 1x4g8 here.*--overwrite"):
        quantize(make_job(settings(finished, scheme="1x4g8"), Path("run")))
    assert files() == before
    report = quantize(make_job(settings(finished, scheme="1x4g8"), Path("run"), overwrite=True))
    assert report.scheme == "1x4g8" and files() != before


def test_a_calibration_made_again_is_another_one_though_its_settings_are_the_same(finished: Path) -> None:
    config = settings(finished)
    parents = quantized().manifest.parents
    assert parents["calibration"] == open_artifact(Path("run/calibration"), "calibration").digest
    assert parents["model"] == resolve(str(finished)).identity
    Path("a.txt").write_text(Path("a.txt").read_text().upper())
    calibrate(make_job(config, Path("run"), overwrite=True))
    with pytest.raises(ArtifactError, match=r"made from\.calibration \w+ there, \w+ asked; add --overwrite"):
        quantize(make_job(config, Path("run")))


def test_a_run_without_calibration_says_how_to_make_one(llama: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no .*calibration.*aqlm calibrate"):
        quantize(make_job(settings(llama), Path("run")))


# ---------------------------------------------------------------------------------------------------------- the disk


def test_hidden_states_are_gone_at_the_end_and_nothing_else_is_left(finished: Path) -> None:
    assert files().keys() == {"block-000.safetensors", "block-001.safetensors"}
    assert not Path("run/quantized.partial").exists()


def test_a_disk_without_room_for_hidden_states_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(descriptor: int, offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calibrate(make_job(settings(llama), Path("run")))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"no space left on device while writing .*\.activations; free space"):
        run(settings(llama))
    assert asked == [4 * 11 * LENGTH * 64]
    assert not Path("run/quantized").exists()


@pytest.mark.parametrize("when", ["block-000", "block-001", "manifest"])
def test_a_disk_that_fills_up_on_the_way_publishes_nothing(
    when: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(make_job(settings(llama), Path("run")))
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name.startswith(when):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="no space left"):
        quantize(make_job(settings(llama), Path("run")))
    assert not Path("run/quantized").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


def calibrated_before(model: Path, name: str, value: float) -> RunConfig:
    """A run whose calibration knows nothing of the one weight that is then damaged."""
    config = settings(model)
    calibrate(make_job(config, Path("run")))
    ids = load_file("run/calibration/windows.safetensors")["ids"]
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    directory = open_run(Path("run"), config)
    with directory.stage(StageKey(CALIBRATE, {}, {"model": resolve(str(model)).identity})) as stage:
        save_tensors(stage.directory / "windows.safetensors", {"ids": ids})
        stage.publish({})
    return config


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.layers.1.mlp.down_proj", r"^model\.layers\.1\.mlp\.down_proj: the weight holds NaN"),
        ("model.layers.0.self_attn.q_proj", r"^model\.layers\.0\.\w+\.\w+_proj: .* NaN"),  # it spoils inputs, too
    ],
)
def test_a_weight_of_nan_is_refused_with_the_name_of_its_layer(path: str, named: str, llama: Path) -> None:
    config = calibrated_before(llama, f"{path}.weight", torch.nan)
    with pytest.raises(QuantizationError, match=named):
        quantize(make_job(config, Path("run")))
    assert not Path("run/quantized").exists()


@pytest.mark.parametrize("value", [1e30, torch.nan])
def test_activations_that_overflow_are_refused_with_the_name_of_their_layer(value: float, llama: Path) -> None:
    config = calibrated_before(llama, "model.layers.1.post_attention_layernorm.weight", value)
    with pytest.raises(
        QuantizationError, match=r"^model\.layers\.1\.mlp\.\w+_proj: its inputs hold NaN or infinite values"
    ):
        quantize(make_job(config, Path("run")))
    assert not Path("run/quantized").exists()


def test_a_pattern_that_matches_nothing_is_refused_before_any_work(llama: Path) -> None:
    events: list[Event] = []
    with pytest.raises(PlanError, match="--only 'nothing' matches no layer"):
        run(settings(llama, only=["nothing"]), events=events)
    assert events == []


def test_layers_that_do_not_fit_the_scheme_keep_their_16_bits(llama: Path) -> None:
    """Groups of 32 divide 64 inputs and 128, groups of 48 neither."""
    with pytest.raises(PlanError, match="nothing is left to quantize with 1x4g48"):
        run(settings(llama, scheme="1x4g48"))


# ------------------------------------------------------------------------------------------------------------- modules


def test_a_quantized_block_computes_with_what_is_stored(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[nn.Module] = []
    advance = CalibrationPass.advance

    def noting(work: CalibrationPass, block: nn.Module) -> float:
        blocks.append(block)
        return advance(work, block)

    monkeypatch.setattr(CalibrationPass, "advance", noting)
    run(settings(llama))
    for index, block in enumerate(blocks):
        modules = {path: module for path, module in block.named_modules() if isinstance(module, AdditiveLinear)}
        assert len(modules) == 7 and not linears(block, "")
        for path, module in modules.items():
            stored = matrices()[f"model.layers.{index}.{path}"]
            for name, tensor in module.matrix().tensors().items():
                assert torch.equal(tensor, stored.tensors()[name])
        for name, values in tuned_parameters(block, f"model.layers.{index}").items():
            if values.ndim == 1 and name in vectors():
                assert torch.equal(values, vectors()[name])
        assert not any(parameter.requires_grad for parameter in block.parameters())


def test_the_report_is_the_manifests(llama: Path) -> None:
    report = run(settings(llama))
    results = quantized().manifest.results
    assert {**results["report"], "directory": report.directory} == dataclasses.asdict(report)
    assert results["layers"].keys() == matrices().keys()
    assert report.memory_bytes > 10**7 and report.seconds > 0
    logs = [entry["relative_error"] for entry in results["layers"].values()]
    assert report.mean_relative_error == pytest.approx(float(torch.tensor(logs).log().mean().exp()), rel=1e-5)
