"""Weight files of models: those that can be read, and the fix for those that cannot.

transformers reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. If only that index is
missing, it is rebuilt from the headers of the shards. Everything else is an error of one line with its fix. Nothing
here opens a pickle: such weights are converted by transformers, which loads them with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.runs.files import storage_errors, write_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
OF_A_TRAINER = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt"}

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.safetensors|\.gguf)")

CONVERT = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; s, d = sys.argv[1:]; "
    'M.from_pretrained(s, dtype="auto").save_pretrained(d); T.from_pretrained(s).save_pretrained(d)'
)
MERGE = (
    "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
    's, d = sys.argv[1:]; m = M.from_pretrained(s, dtype="auto"); '
    "T.from_pretrained(m.peft_config[m.active_adapter].base_model_name_or_path).save_pretrained(d); "
    "m.merge_and_unload().save_pretrained(d)"
)
"""Programs with two arguments: a directory or a hub id, and the directory to write."""


def file_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())


# ------------------------------------------------------------------------------------------------------ what is read


def has_weights(directory: Path) -> bool:
    """True if the directory has weights in safetensors; a plan fetches from the hub the index alone."""
    names = file_names(directory)
    return WEIGHTS in names or (WEIGHTS_INDEX in names and any(name.endswith(".safetensors") for name in names))


def holds_weights(directory: Path) -> bool:
    """True if the directory has weights, or a list of them, in any format."""
    names = set(file_names(directory)) - OF_A_TRAINER
    return any(name == WEIGHTS_INDEX or Path(name).suffix in WEIGHT_SUFFIXES for name in names)


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads the weights from; ModelError if they are missing."""
    names = set(file_names(directory))
    if WEIGHTS in names:  # takes precedence over an index
        return [directory / WEIGHTS]
    if WEIGHTS_INDEX not in names:
        raise ModelError(why_no_weights(str(directory), names))
    index = directory / WEIGHTS_INDEX
    files = read_settings(index).get("weight_map")
    if not (isinstance(files, dict) and all(isinstance(name, str) for name in files.values())):
        raise ModelError(f"{index} has no valid weight_map; fetch the model again")
    # Names are reduced to the directory itself: an index is untrusted.
    paths = [directory / Path(name).name for name in sorted(set(files.values()))]
    missing = [path.name for path in paths if path.name not in names]
    if missing:
        raise ModelError(f"{directory} lacks {_listed(missing)}, which {WEIGHTS_INDEX} names; fetch the model again")
    return paths


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch the model, or pack the run, again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the model again")
    return settings


# ------------------------------------------------------------------------------------------------ what cannot be read


def why_no_config(directory: Path) -> str:
    """Error message for a directory without config.json, with the fix."""
    names = file_names(directory)
    if ADAPTER in names:
        return _adapter(str(directory))
    if any(name.endswith(".gguf") for name in names):
        return _gguf(str(directory), names, here=True)
    if any(name.startswith("consolidated.") for name in names):
        return _of_its_maker(str(directory), names)
    return f"{directory} has no config.json, so it is not a Hugging Face model"


def why_no_weights(place: str, names: Collection[str], here: bool = True) -> str:
    """Error message for a model without readable weights, with the fix; `place` is a directory or a hub id."""
    names = sorted(names)
    shards = [match for name in names if (match := SHARD.fullmatch(name)) and name.endswith(".safetensors")]
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        command = _command(CONVERT, place, "safetensors")
        return f"{place} has pickles; only weights in safetensors are read: run `{command}` and use the result"
    if any(name.startswith("consolidated") for name in names):
        return _of_its_maker(place, names)
    if shards:
        return f"{place} lacks {_missing(shards)}; fetch the model again"
    if any(name.endswith(".gguf") for name in names):
        return _gguf(place, names, here)
    for name, program in {"tf_model.h5": "TensorFlow", "flax_model.msgpack": "Flax"}.items():
        if name in names:
            return (
                f"{place} has only {program} weights ({name}), which transformers 5 does not read; use another "
                f"copy of the model, or load it with transformers 4 and save it with save_pretrained"
            )
    others = [name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and name not in OF_A_TRAINER]
    if others:
        return f"{place} has {_listed(others)} and no {WEIGHTS}, which is what transformers reads; rename or convert it"
    return f"{place} has no {WEIGHTS}; only weights in safetensors are read, so fetch the model again"


def refuse_adapter(place: str, directory: Path) -> None:
    """Raise ModelError for a directory with an adapter: transformers would load its base model from anywhere."""
    if (directory / ADAPTER).is_file():
        raise ModelError(_adapter(place))


def _adapter(place: str) -> str:
    command = _command(MERGE, place, "merged")
    return f"{place} holds a PEFT adapter ({ADAPTER}), not a full model; merge it: run `{command}` and use the result"


def _of_its_maker(place: str, names: Iterable[str]) -> str:
    files = [name for name in names if name.startswith("consolidated")]
    return (
        f"{place} holds a model in its publisher's own format ({_listed(files)}); use the transformers version, "
        f"which has {WEIGHTS} or {WEIGHTS_INDEX}"
    )


def _gguf(place: str, names: Iterable[str], here: bool) -> str:
    """Error message for GGUF files; a split file is named by its first part."""
    files = [name for name in names if name.endswith(".gguf")]
    first = [name for name in files if not (part := SHARD.fullmatch(name)) or int(part["number"]) == 1] or files
    more = f" (or another of its {len(first)} files)" if len(first) > 1 else ""
    if here:
        return f"{place} is a directory of GGUF files; name the file: {Path(place) / first[0]}{more}"
    command = f"hf download {shlex.quote(place)} {shlex.quote(first[0])} --local-dir ."
    return f"{place} holds GGUF files; run `{command}`{more} and name the file"


def _missing(shards: list[re.Match[str]]) -> str:
    """Names of missing shards, or why the names do not form one set."""
    sets = {(shard["stem"], shard["count"]) for shard in shards}
    if len(sets) > 1:
        return f"{WEIGHTS_INDEX}, and has shards of {len(sets)} sets ({_listed([shard[0] for shard in shards])})"
    ((stem, count),) = sets
    present = {int(shard["number"]) for shard in shards}
    first = next((number for number in range(1, int(count) + 1) if number not in present), 0)
    absent = int(count) - len(present)
    more = f" and {absent - 1} more" if absent > 1 else ""
    return f"{stem}-{first:0{len(shards[0]['number'])}d}-of-{count}.safetensors{more}"


def _command(program: str, place: str, suffix: str) -> str:
    output = f"{place.rstrip('/')}-{suffix}" if Path(place).is_dir() else f"{place.rpartition('/')[2]}-{suffix}"
    return f"python -c '{program}' {shlex.quote(place)} {shlex.quote(output)}"


def _listed(names: list[str]) -> str:
    return shortened(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# ------------------------------------------------------------------------------------------------- shards without index


def with_index(directory: Path, cache: Path) -> Path:
    """The directory, or one of links to its files plus the missing index; reads headers only."""
    names = file_names(directory)
    index = None if WEIGHTS in names else _completed(directory) if WEIGHTS_INDEX in names else _made(directory, names)
    if index is None:
        return directory
    key = hashlib.sha256("\n".join([str(directory.resolve()), *names, index]).encode()).hexdigest()
    view = cache / "indexed" / key
    if not view.is_dir():
        with storage_errors(view):
            view.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=view.parent))
            try:
                for path in directory.resolve().iterdir():
                    if path.name != WEIGHTS_INDEX:
                        os.symlink(path, beside / path.name)
                write_file(beside / WEIGHTS_INDEX, index.encode())
                if not view.is_dir():  # or another process was faster
                    beside.rename(view)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return view


def _completed(directory: Path) -> str | None:
    """Text of the index with the `metadata` that transformers needs; None if it has them, or if there is no shard."""
    index = read_settings(directory / WEIGHTS_INDEX)
    if isinstance(index.get("metadata"), dict) or not has_weights(directory):
        return None
    files = weight_files(directory)  # first, because it refuses an invalid index
    return _text(index["weight_map"], files)


def _made(directory: Path, names: Iterable[str]) -> str | None:
    """Text of an index for the shards; None if some are missing."""
    shards = [match for name in names if (match := SHARD.fullmatch(name)) and name.endswith(".safetensors")]
    numbers = sorted(int(shard["number"]) for shard in shards)
    sets = {(shard["stem"], shard["count"]) for shard in shards}
    # The count is compared before numbers are listed: a file name may claim any count.
    whole = len(sets) == 1 and len(shards) == int(shards[0]["count"]) and numbers == list(range(1, len(shards) + 1))
    if not whole or shards[0]["stem"].startswith("consolidated"):
        return None
    return _index(directory, [shard[0] for shard in shards])


def _index(directory: Path, shards: list[str]) -> str:
    """Text of model.safetensors.index.json for these files."""
    files: dict[str, str] = {}
    for name in shards:
        try:
            with safe_open(directory / name, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dict
                    if tensor in files:
                        raise ModelError(
                            f"{directory}: {files[tensor]} and {name} both hold {tensor}; fetch the model again"
                        )
                    files[tensor] = name
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / name} is damaged ({error}); fetch the model again") from error
    return _text(files, [directory / name for name in shards])


def _text(files: dict[str, str], paths: Iterable[Path]) -> str:
    size = sum(path.stat().st_size for path in paths)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}, indent=2)
