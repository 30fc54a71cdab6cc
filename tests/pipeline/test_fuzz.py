"""Files from strangers: whatever lies in them, a reader takes it or refuses it in one line, soon and in little memory.

Each case starts from what our own writers wrote and damages it: bytes are changed anywhere, and values where the
format has a tree of them. Nothing may be written outside the directory of the case, run as a program, or asked of a
network, whether or not the reader takes what it gets.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from helpers import tiny_models
from helpers.gguf_files import write_gguf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aqlm_cli.errors import AqlmError
from aqlm_cli.models import load_network, load_skeleton, resolve, tensor_index
from aqlm_cli.models.source import ModelSource
from aqlm_cli.models.weight_files import WEIGHTS
from aqlm_cli.runs.artifact import MANIFEST
from aqlm_cli.runs.directory import open_run, read_run
from aqlm_cli.runs.files import load_tensors, read_metadata, save_tensors, write_file
from aqlm_cli.runs.stages import PACK, StageKey, kinds, stages_of
from aqlm_cli.spec.run_file import build_config, dump_yaml
from aqlm_kernels import KernelError

SECONDS = 10
"""For one case, on a busy machine: a hang takes for ever."""

MEMORY = 1 << 30
"""Bytes by which all cases together may raise the peak: a blow-up has no bound."""

# ------------------------------------------------------------------------------------------------------------- damage

ODD_NUMBERS = (True, -1, 0, 10**6, 2**31, 2**60, -(2**63), 10**400, 0.5, -0.0, 1e308, math.inf, math.nan)
NAMES = ("gpt2", "bert", "mixtral", "gemma3_text", ".", "../../outside", "/etc/passwd", "os.system('false')")
ODD_TEXTS = ("", "a\nb\x1b[31m\u2028", "\ud800", "\0", "x" * 5000, "<lists in lists>", "{{ 7 * 7 }}")
ODD_TREES = (None, [], {}, [[]], {"": {"": []}}, {"AutoConfig": "payload.Payload"})
ODD_VALUES: tuple[Any, ...] = (*ODD_NUMBERS, *NAMES, *ODD_TEXTS, *ODD_TREES)

LARGE = tuple(struct.pack("<Q", value) for value in (2**40, 2**60, 2**63, 2**64 - 1))
NUMBERS = (*(struct.pack(f, n) for f in ("<I", "<Q") for n in (0, 1, 9, 2**31, 2**32 - 1)), *LARGE)
"""Counts, lengths and types that lead out of a binary file."""

IN_JSON = (b"1e999", b"-99999999999999999999", b"NaN", b'"', b"[" * 3000, b'{"a":' * 3000)
IN_YAML = (b"\nb: &b {<<: [*a, *a]}\n", b"&a [*a]", b"!!timestamp x", b"2001-99-99", b"0x" + b"f" * 5000, b"? ")
FRAGMENTS = (*NUMBERS, *IN_JSON, *IN_YAML, b"\xff\xfe", b"\0", b"\n", b"\t", b"!!python/object/apply:os.system [x]")


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four times: bits flipped, cut, inserted, a slice doubled, or a number overwritten."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        # Headers come first, and what is wrong there leads furthest.
        place = chance.randint(0, min(len(found), chance.choice([16, 200, 2000, len(found)])))
        match chance.randrange(6):
            case 0 if place < len(found):
                found[place] ^= 1 << chance.randrange(8)
            case 1:
                del found[place:]
            case 2:
                found[place:place] = chance.choice(FRAGMENTS)
            case 3:
                found[place:place] = found[place : place + chance.randint(1, 300)]
            case 4:
                del found[place : place + chance.randint(1, 40)]
            case _:
                number = chance.choice(NUMBERS)
                found[place : place + len(number)] = number
    return bytes(found)


def damaged_tree(value: Any, chance: random.Random) -> Any:
    """The same JSON value with one leaf or subtree replaced, removed or added."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        copy: Any = value.copy()
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        match chance.randrange(12):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[chance.choice(["auto_map", "a.b", "", "\ud800", "../x", "k" * 3000])] = chance.choice(ODD_VALUES)
            case _:
                copy[key] = damaged_tree(value[key], chance)
        return copy
    if isinstance(value, int) and chance.random() < 0.4:
        return chance.choice([value + 1, -value, value * 1000, value * 10**9, str(value), [value]])
    return chance.choice(ODD_VALUES)


# ------------------------------------------------------------------------------------------------------------ parsers


@dataclass(frozen=True)
class Parser:
    """`prepare` makes a directory that `read` takes; `file` in it is damaged, as bytes or, by `tree`, as values."""

    file: str
    prepare: Callable[[Path], None]
    read: Callable[[Path], None]
    tree: Callable[[bytes, random.Random], bytes]

    def damaged(self, data: bytes, chance: random.Random) -> bytes:
        return damaged_bytes(data, chance) if chance.random() < 0.4 else self.tree(data, chance)


def json_tree(data: bytes, chance: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        value = damaged_tree(value, chance)
    return nested(json.dumps(value).encode(), chance)


def yaml_tree(data: bytes, chance: random.Random) -> bytes:
    value = damaged_tree(yaml.safe_load(data), chance)
    data = json.dumps(value).encode() if chance.random() < 0.5 else yaml.safe_dump(value).encode()
    return nested(data, chance)


def nested(data: bytes, chance: random.Random) -> bytes:
    """With lists deeper than Python's own writers would write them."""
    depth = chance.choice([100, 300, 600, 900, 970, 5000])
    return data.replace(b'"<lists in lists>"', b"[" * depth + b"]" * depth)


def header_tree(data: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file: shapes, offsets, types and names."""
    size = int.from_bytes(data[:8], "little")
    text = json_tree(data[8 : 8 + size], chance)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def gguf_tree(data: bytes, chance: random.Random) -> bytes:
    """Of a GGUF: keys, types, counts and values of its settings, and what it says of its tensors."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 2)):
        start, length = chance.choice(chance.choice(parts_of_gguf(data)))
        odd = chance.choice([*NUMBERS, chance.randbytes(length), b"tensor", b"bert", b"gpt2"])
        damaged[start : start + length] = odd.ljust(length, b"\0")[:length]
    return bytes(damaged)


@cache
def parts_of_gguf(data: bytes) -> list[list[tuple[int, int]]]:
    """Place and length of all that the header holds, by setting and tensor."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = gguf.GGUFReader(file.name)
        fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
        begin = reader.data.ctypes.data
        return [[(part.ctypes.data - begin, part.nbytes) for part in field.parts if part.size] for field in fields]


def prepare_run_file(directory: Path) -> None:
    (directory / "run.yaml").write_text(dump_yaml(build_config("paper", None, {"model": "tiny"})))


def read_run_file(directory: Path) -> None:
    build_config("fast", directory / "run.yaml", {"seed": 1})


def prepare_run(directory: Path) -> None:
    """A run whose artifacts are made one from the other."""
    run, parents = open_run(directory, build_config(None, None, {"model": "tiny"})), {"model": "sha256:0"}
    for kind in kinds():
        with run.stage(StageKey(stages_of(kind)[-1], {"scheme": "2x8g8", "skip": ["lm_head"]}, parents)) as stage:
            write_file(stage.directory / "block-000.safetensors", b"codes")
            parents = {**parents, kind: stage.publish({"loss": 1.5, "times": [1, 2]}).digest}


def read_artifacts(directory: Path) -> None:
    run = read_run(directory)
    for kind in kinds():
        run.current(kind)
    parents = run.current("packed").manifest.parents
    run.reusable(StageKey(PACK, {"scheme": "2x8g8", "skip": ["lm_head"]}, parents))


def prepare_tensors(directory: Path) -> None:
    tensors = {"codes": torch.arange(6).reshape(2, 3), "empty": torch.zeros(0, 4), "scales": torch.ones(3).half()}
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt", "kinds": "{}"})


def read_tensors(directory: Path) -> None:
    for stored in tensor_index(directory).values():
        _ = stored.bytes
    read_metadata(directory / WEIGHTS)
    load_tensors(directory / WEIGHTS)


def prepare_gguf(directory: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 259}
    original = tiny_models.save("llama", directory / "original", **shape)
    write_gguf(original, directory / "tiny.gguf", gguf.GGMLQuantizationType.F16)


def prepare_model(directory: Path) -> None:
    tiny_models.save("llama", directory)
    (directory / "payload.py").write_text("import os\nos.system('true')\n")


def read_model(directory: Path) -> None:
    load_network(found(directory), torch.float32)


def read_gguf(directory: Path) -> None:
    load_skeleton(found(directory / "tiny.gguf"))


def found(name: Path) -> ModelSource:
    shutil.rmtree("cache", ignore_errors=True)  # or what one case left would answer for the next
    return resolve(str(name), cache_dir=Path("cache"))


PARSERS: Mapping[str, Parser] = {
    "run file": Parser(
        "run.yaml", prepare_run_file, lambda here: build_config("fast", here / "run.yaml", {}), yaml_tree
    ),
    "manifest": Parser(f"packed/{MANIFEST}", prepare_run, read_artifacts, json_tree),
    "safetensors": Parser(WEIGHTS, prepare_tensors, read_tensors, header_tree),
    "config.json": Parser(
        "config.json", prepare_model, lambda here: load_network(found(here), torch.float32), json_tree
    ),
    "GGUF": Parser("tiny.gguf", prepare_gguf, lambda here: found(here / "tiny.gguf"), gguf_tree),
}


# ------------------------------------------------------------------------------------------------------ what is watched


class TooSlow(BaseException):
    """Not an Exception: nobody shall take it for what a parser says."""


@contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, whoever else is at work on this machine
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
CALLS = ("socket.connect", "socket.getaddrinfo")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Watch:
    """What Python reports of writing outside a directory, of starting programs, and of calling a network."""

    directory: Path | None = None

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        paths = arguments[:2] if event == "os.rename" else arguments[:1] if writes or event in CHANGES else ()
        outside = [path for path in paths if isinstance(path, str | bytes | os.PathLike) and not self.covers(path)]
        if event in (*RUNS, *CALLS) or outside:
            self.seen.append(f"{event} {arguments}")

    @contextmanager
    def within(self, directory: Path) -> Iterator[None]:
        self.directory = directory
        try:
            yield
        finally:
            self.directory = None

    def covers(self, path: str | bytes | os.PathLike[str]) -> bool:
        text = os.path.realpath(os.fsdecode(path))
        return text == os.devnull or text.startswith(os.path.realpath(str(self.directory)) + os.sep)


@pytest.fixture(scope="module")
def python_reports() -> Watch:
    watch = Watch()
    sys.addaudithook(watch)  # for good: Python knows no way to remove one
    return watch


@pytest.fixture
def watched(python_reports: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """An empty working directory outside of which nothing happens, and memory that ends before the machine's."""
    limits, python_reports.seen = resource.getrlimit(resource.RLIMIT_AS), []
    resource.setrlimit(resource.RLIMIT_AS, (in_kilobytes("VmSize") * 1024 + 4 * MEMORY, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = in_kilobytes("VmHWM")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no disk is on trial here
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield python_reports
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (in_kilobytes("VmHWM") - before) * 1024 < MEMORY


def in_kilobytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, cases: int, tmp_path: Path, watched: Watch) -> None:
    parser, path = PARSERS[name], tmp_path / PARSERS[name].file
    parser.prepare(tmp_path)
    whole = path.read_bytes()
    parser.read(tmp_path)

    # The number is the seed of the damage. There is nothing to make smaller in it.
    @settings(
        max_examples=cases,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def attack(seed: int) -> None:
        path.write_bytes(parser.damaged(whole, random.Random(seed)))
        try:
            with in_time(), watched.within(tmp_path):
                parser.read(tmp_path)
        except (AqlmError, KernelError) as error:
            assert str(error).isprintable()
        assert watched.seen == []

    attack()
