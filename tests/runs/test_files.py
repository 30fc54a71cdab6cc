from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aqlm_cli.errors import ArtifactError, StorageError
from aqlm_cli.runs.files import (
    DTYPES,
    TensorLayout,
    load_tensors,
    read_metadata,
    read_tensor,
    save_tensors,
    stream_tensors,
    tensor_names,
    write_file,
)


def one_of_each_type() -> dict[str, torch.Tensor]:
    return {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}


def header(path: Path) -> dict[str, dict[str, list[int]]]:
    data = path.read_bytes()
    found: dict[str, dict[str, list[int]]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def test_the_safetensors_package_reads_every_type_and_shape_we_write(tmp_path: Path) -> None:
    tensors = {
        **one_of_each_type(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    save_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert read_metadata(tmp_path / "t.safetensors") == {"kind": "test"}


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = one_of_each_type()
    save_tensors(tmp_path / "a", tensors)
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@st.composite
def any_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Of any type and shape, no elements and no axes among them, any bytes in them, and under any name."""

    def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
        generator, size = torch.Generator().manual_seed(seed), math.prod(shape) * dtype.itemsize
        top = 2 if dtype == torch.bool else 256
        return torch.randint(top, (size,), generator=generator).to(torch.uint8).view(dtype).reshape(shape)

    shapes = st.lists(st.integers(0, 5), max_size=4)
    tensors = st.builds(tensor, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 2**32))
    return draw(st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), tensors, max_size=8))


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    return {
        name: (tensor.dtype, list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.slow
@given(tensors=any_tensors(), metadata=st.dictionaries(st.text(), st.text(), max_size=3))
def test_whatever_is_written_the_safetensors_package_and_we_read_the_same(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, tensors, metadata)
    assert bytes_of(load_file(path)) == bytes_of(load_tensors(path)) == bytes_of(tensors)
    assert read_metadata(path) == metadata
    assert tensor_names(path) == sorted(tensors)
    assert bytes_of({name: read_tensor(path, name) for name in tensors}) == bytes_of(tensors)
    written = path.read_bytes()
    save_tensors(path, dict(reversed(load_tensors(path).items())), metadata)
    assert path.read_bytes() == written


@given(tensors=any_tensors())
def test_whatever_the_safetensors_package_writes_we_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "t.safetensors")
    assert bytes_of(load_tensors(tmp_path / "t.safetensors")) == bytes_of(tensors)


def test_every_tensor_lies_aligned_to_its_type(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"odd": torch.zeros(3, dtype=torch.uint8), **one_of_each_type()})
    size = int.from_bytes((tmp_path / "t").read_bytes()[:8], "little")
    for name, entry in header(tmp_path / "t").items():
        width = DTYPES[str(entry["dtype"])].itemsize
        assert (8 + size + entry["data_offsets"][0]) % width == 0, name


def test_a_stream_asks_for_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Each tensor is asked for once, and only after the one before it has been taken."""
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((2,), float(len(asked)))

    layout = TensorLayout(torch.float32, (2,))
    stream_tensors(tmp_path / "t", {"b": layout, "a": layout}, read)
    assert asked == ["a", "b"]
    assert load_tensors(tmp_path / "t")["b"].tolist() == [2.0, 2.0]


def test_a_part_of_a_file_is_read_by_prefix_or_name(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"x.a": torch.ones(1), "x.b": torch.zeros(1), "xy.a": torch.zeros(2)})
    assert sorted(load_tensors(tmp_path / "t", prefix="x.")) == ["a", "b"]
    assert read_tensor(tmp_path / "t", "x.a").tolist() == [1.0]
    assert tensor_names(tmp_path / "t") == ["x.a", "x.b", "xy.a"]


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_file_that_is_no_safetensors_is_one_line_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "cut" else b"not tensors at all")
    with pytest.raises(ArtifactError, match=r"t\.safetensors") as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "read-only"),
        (errno.EIO, "cannot write"),
    ],
)
def test_a_failing_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, fail_disk: Callable[[int, int], None], code: int, words: str
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    fail_disk(code, 0)
    with pytest.raises(StorageError, match=words) as caught:
        write_file(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_source_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, parts())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        write_file(tmp_path / "file" / "inside", b"data")
