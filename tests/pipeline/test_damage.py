"""Disks that are full, read-only or gone, and files with a bit flipped: one line, nothing lost, and a way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import made, refused, run

QUANTIZE = "quantize", "--config", "run.yaml", "--out"


@pytest.fixture
def whole(finished_run: Path) -> dict[str, Any]:
    """What an undisturbed run makes; it lies in `whole` of the working directory, with all that it is made from."""
    finished_run.rename("whole")
    return made(Path("whole"))


# ------------------------------------------------------------------------------------------------------ a small disk


class SmallDisk:
    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kilobytes: int) -> None:
        self._mount("remount", f"size={kilobytes}k")

    def fill(self) -> None:
        with pytest.raises(OSError), open(self.path / "filling", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    def empty(self) -> None:
        (self.path / "filling").unlink()

    def forbid_writing(self) -> None:
        self._mount("remount", "ro")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of its own, of 16 MiB at first."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system may be mounted here")
    yield SmallDisk(path)
    # Lazily, as the traceback of an error may hold the memory of a file that lies there.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


# In kilobytes; whatever fits in 4 KiB takes a page of 4 KiB there.
@pytest.mark.parametrize(
    ("size", "where"),
    [
        (4, "logs/calibrate.jsonl"),
        (8, "run.yaml"),
        (12, "calibration.partial/windows.safetensors"),
        (16, "calibration.partial/work/hidden.activations"),
        (32, "calibration.partial/second_moments.safetensors"),
        (40, "calibration.partial/table_statistics.safetensors"),
        (76, "calibration.partial/manifest.json"),
        (136, "quantized.partial/work/targets.activations"),
        (216, "quantized.partial/work/model.layers.0."),
        (260, "quantized.partial/work/statistics.safetensors"),
        (368, "quantized.partial/block-000.safetensors"),
    ],
)
def test_a_run_that_fills_its_disk_resumes_when_there_is_more(
    whole: dict[str, Any], disk: SmallDisk, size: int, where: str
) -> None:
    disk.resize(size)
    assert f"no space left on device while writing {disk.path}/{where}" in refused(*QUANTIZE, str(disk.path))
    assert run("status", str(disk.path)).exit_code == (0 if size > 8 else 1)  # there is no run.yaml yet
    disk.resize(16 * 1024)
    assert run(*QUANTIZE, str(disk.path)).exit_code == 0
    assert made(disk.path) == whole


COMMANDS = {
    "calibrate": ("calibrate", "--config", "run.yaml", "--overwrite", "--out"),
    "quantize": (*QUANTIZE[:-1], "--overwrite", "--out"),
    "pack": ("pack", "--overwrite"),
    "eval-ppl": ("eval-ppl",),
    "bench": ("bench",),
}
"""Every command that writes to a run; the run itself comes last."""


@pytest.mark.parametrize("command", COMMANDS)
def test_on_a_full_disk_every_command_says_so_and_leaves_what_is_there(
    whole: dict[str, Any], disk: SmallDisk, command: str
) -> None:
    shutil.copytree("whole", disk.path / "run")
    disk.fill()
    assert "no space left on device while writing" in refused(*COMMANDS[command], str(disk.path / "run"))
    assert made(disk.path / "run") == whole
    for reading in ("status",), ("generate", "--prompt", "A"):
        assert run(*reading, str(disk.path / "run")).exit_code == 0
    disk.empty()
    assert run(*COMMANDS[command], str(disk.path / "run")).exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_on_a_read_only_disk_every_command_says_so(whole: dict[str, Any], disk: SmallDisk, command: str) -> None:
    shutil.copytree("whole", disk.path / "run")
    disk.forbid_writing()
    line = refused(*COMMANDS[command], str(disk.path / "run"))
    assert f"{disk.path}/run" in line and "is read-only for this user; choose another place" in line
    assert made(disk.path / "run") == whole


# ------------------------------------------------------------------------------------------------ a directory that goes


@pytest.fixture
def on_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Callable[[], Any]], None]:
    """`on_write(text, count, act)`: `act` once, after the `count`-th write to a path with `text`."""

    def arrange(text: str, count: int, act: Callable[[], Any]) -> None:
        sync, seen = os.fsync, []

        def watched(descriptor: int) -> None:
            here = text in os.readlink(f"/proc/self/fd/{descriptor}")
            sync(descriptor)
            if here and len(seen) < count:
                seen.append(descriptor)
                if len(seen) == count:
                    act()

        monkeypatch.setattr(os, "fsync", watched)

    return arrange


PLACES = [
    ("calibration.partial/windows", 1),
    ("calibration.partial/manifest", 1),
    ("quantized.partial/work/begun", 1),
    ("quantized.partial/work/model.layers.0", 3),
    ("quantized.partial/block-000", 1),
    ("quantized.partial/work/model.layers.1", 5),
    ("quantized.partial/work/block-001", 1),
    ("quantized.partial/manifest", 1),
    ("packed.partial/model", 1),
]
"""A part of a path, and which of the writes to it."""


@pytest.mark.parametrize(("text", "count"), PLACES)
def test_a_run_that_is_moved_away_meanwhile_resumes_where_it_is_put_back(
    whole: dict[str, Any], on_write: Callable[..., None], text: str, count: int
) -> None:
    on_write(text, count, lambda: os.rename("out", "moved"))
    line = refused(*QUANTIZE, "out")
    assert "cannot write out/" in line and "its directory is missing; put it back and rerun" in line
    assert not Path("out").exists()
    os.rename("moved", "out")
    assert run(*QUANTIZE, "out").exit_code == 0
    assert made(Path("out")) == whole


@pytest.mark.parametrize(("text", "count"), PLACES[::4])
def test_a_run_that_is_removed_meanwhile_is_not_half_made_again(
    whole: dict[str, Any], on_write: Callable[..., None], text: str, count: int
) -> None:
    on_write(text, count, lambda: shutil.rmtree("out"))
    assert "its directory is missing" in refused(*QUANTIZE, "out")
    assert not Path("out").exists()
    assert run(*QUANTIZE, "out").exit_code == 0
    assert made(Path("out")) == whole


# -------------------------------------------------------------------------------------------------------- a flipped bit


def flip(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# The length of the header, its first character, a name, and the numbers at the end; test_fuzz.py damages every place.
FLIPS = [(0, 0), (8, 4), (40, 2), (-1, 6)]


@pytest.mark.parametrize(("place", "bit"), FLIPS)
@pytest.mark.parametrize("kind", ["calibration", "quantized", "packed"])
def test_a_flipped_bit_ends_no_command_with_a_traceback_and_loses_nothing(
    whole: dict[str, Any], kind: str, place: int, bit: int
) -> None:
    file = {"calibration": "windows", "quantized": "block-000", "packed": "model"}[kind]
    for command in (
        ("pack", "out", "--overwrite"),
        ("eval-ppl", "out"),
        ("generate", "out", "--prompt", "A"),
        ("status", "out"),
        (*QUANTIZE, "out"),
    ):
        shutil.copytree("whole", "out")
        flip(Path("out", kind, f"{file}.safetensors"), place, bit)
        before = made(Path("out"))
        result = run(*command)
        assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None), result.exception
        if result.exit_code == 1:
            assert result.stderr.count("\n") == 1
            assert {name: made(Path("out"))[name] for name in before} == before
        shutil.rmtree("out")


HEADER = FLIPS[:-1]


@pytest.mark.parametrize(("place", "bit"), HEADER)
def test_a_damaged_block_names_the_command_that_makes_it_again(whole: dict[str, Any], place: int, bit: int) -> None:
    flip(Path("whole/quantized/block-000.safetensors"), place, bit)
    line = refused("pack", "whole", "--overwrite")
    assert "is damaged (" in line and "redo it with `aqlm quantize --config whole/run.yaml --out whole --ov" in line
    assert run("quantize", "--config", "whole/run.yaml", "--out", "whole", "--overwrite").exit_code == 0
    assert made(Path("whole")) == whole


def test_damaged_sequences_name_the_command_that_makes_them_again(whole: dict[str, Any]) -> None:
    shutil.rmtree("whole/quantized")
    flip(Path("whole/calibration/windows.safetensors"), 8)
    assert "redo it with `aqlm calibrate --config whole/run.yaml --out whole --ov" in refused(*QUANTIZE, "whole")
    assert run("calibrate", "--config", "whole/run.yaml", "--out", "whole", "--overwrite").exit_code == 0
    assert run(*QUANTIZE, "whole").exit_code == 0
    assert made(Path("whole")) == whole


@pytest.mark.parametrize("kind", ["calibration", "quantized", "packed"])
@pytest.mark.parametrize("place", [0, 200])
def test_a_damaged_manifest_names_a_command_that_mends_it(whole: dict[str, Any], kind: str, place: int) -> None:
    flip(Path("whole", kind, "manifest.json"), place, bit=7)
    line = refused("eval-ppl", "whole")
    assert f"whole/{kind}/manifest.json is not a manifest" in line
    command = line.partition("redo it with `aqlm ")[2].partition("`")[0].split()
    assert run(*command).exit_code == 0
    assert run(*QUANTIZE, "whole").exit_code == 0
    assert made(Path("whole")) == whole


@pytest.mark.parametrize("place", [0, 7])
def test_a_damaged_run_file_is_named_and_written_again_with_overwrite(whole: dict[str, Any], place: int) -> None:
    flip(Path("whole/run.yaml"), place, bit=7)
    for command in ("pack", "whole"), ("eval-ppl", "whole"), ("status", "whole"), (*QUANTIZE, "whole"):
        assert "whole/run.yaml is not YAML" in refused(*command)
    assert run(*QUANTIZE, "whole", "--overwrite").exit_code == 0
    assert made(Path("whole")) == whole


def test_a_damaged_tokenizer_is_one_line(whole: dict[str, Any]) -> None:
    for place in range(20, 60, 7):
        flip(Path("whole/packed/tokenizer.json"), place)
        line = refused("eval-ppl", "whole")
        assert "packed/tokenizer.json cannot be read" in line or "its tokenizer cannot be loaded" in line
        flip(Path("whole/packed/tokenizer.json"), place)


def test_a_damaged_report_is_named(whole: dict[str, Any]) -> None:
    evaluate = "eval-ppl", "whole", "--no-divergence"  # which alone keeps the figures of the base model
    assert run(*evaluate).exit_code == 0
    for pattern, command in ("eval-ppl-*", ("pack", "whole", "--overwrite")), ("base-model-*", evaluate):
        (path,) = Path("whole/reports").glob(pattern)
        flip(path, 0, bit=7)
        assert f"{path} cannot be read" in refused(*command)
        path.unlink()
        assert run(*command).exit_code == 0


@pytest.mark.parametrize(
    "name", ["begun.json", "block-000.json", "model.layers.1.mlp.down_proj.safetensors", "hidden-001.activations"]
)
@pytest.mark.parametrize("place", [0, 8, 40])
def test_damaged_work_is_named_or_resumed_from(
    whole: dict[str, Any], interrupted_run: tuple[str, ...], name: str, place: int
) -> None:
    path = Path("out/quantized.partial/work", name)
    flip(path, place, bit=7)
    result = run(*QUANTIZE, "out")
    if name == "hidden-001.activations":  # numbers, and nobody knows which
        assert result.exit_code == 0
        return
    fixes = ("to start again", "to start again", "remove it and rerun")
    assert result.exit_code == 1 and any(fix in result.stderr for fix in fixes)
    assert result.stderr.count("\n") == 1 and str(path.parent) in result.stderr
    path.unlink() if path.suffix == ".safetensors" else shutil.rmtree(path.parent)
    assert run(*QUANTIZE, "out").exit_code == 0
    assert made(Path("out")) == whole


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({}, "run/quantized/manifest.json has no result `plan`"),
        ({"plan": 3}, "its manifest holds no plan"),
        ({"plan": {"targets": [{}]}}, "its manifest holds no plan"),
    ],
)
def test_a_manifest_without_its_results_names_the_command_that_makes_it_again(
    finished_run: Path, results: dict[str, Any], words: str
) -> None:
    path = finished_run / "quantized" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "results": results}))
    for command in ["verify", "run"], ["pack", "run", "--overwrite"]:
        line = refused(*command)
        assert words in line and "aqlm quantize --config run/run.yaml --out run --overwrite" in line
