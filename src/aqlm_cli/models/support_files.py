"""Files of a model's directory that its tokenizer and processor read: they are packed, fetched and digested.

transformers names most of them in `vocab_files_names` of its tokenizers (a test checks all of them). A tokenizer with
its own code may name its files freely, and in practice uses the patterns below. All are in the top folder, but for the
chat templates beside the default one, which have a folder.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from aqlm_cli.errors import ModelError

TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps a tokenizer's named chat templates, as `NAME.jinja`."""

NAMES = (
    "*tokenizer*",
    "*vocab*",
    "*merges*",
    "*.model",  # sentencepiece, and tiktoken's `tiktoken.model`
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
"""Names in the top folder: tokenizer, chat template, generation settings, processor of a multimodal model."""

NEVER = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".py", ".pyc"}
"""Suffixes of weights and code, which are never support files."""

LOADED = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
"""Suffixes of files that a model is loaded from, beside those of its tokenizer."""

FETCHED = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.codes", "*.tokenizer")
"""Patterns for the hub's small files: these, config.json and the index of the weights."""


def is_support_file(relative: str) -> bool:
    """True for a support file; `relative` has slashes and is relative to the model's directory."""
    path = PurePosixPath(relative)
    if path.parent == PurePosixPath(TEMPLATES):
        return path.suffix == ".jinja"
    return "/" not in relative and path.suffix not in NEVER and any(fnmatchcase(relative, name) for name in NAMES)


def support_files(directory: Path) -> list[Path]:
    """Support files in the directory, relative to it and in order."""
    found = [*directory.iterdir(), *(directory / TEMPLATES).glob("*")]
    relative = sorted(path.relative_to(directory) for path in found if path.is_file())
    return [path for path in relative if is_support_file(path.as_posix())]


def loaded_files(directory: Path) -> list[str]:
    """All files that a model is loaded from, relative to its directory, with slashes and in order."""
    names = {path.name for path in directory.iterdir() if path.suffix in LOADED}
    return sorted(names | {path.as_posix() for path in support_files(directory)})


def refuse_broken(directory: Path) -> None:
    """Raise ModelError if a name of `loaded_files` is not a file, such as a dangling link."""
    for path in sorted([*directory.iterdir(), *(directory / TEMPLATES).glob("*")]):
        if path.is_file():
            continue
        if path.suffix in LOADED or (not path.exists() and is_support_file(path.relative_to(directory).as_posix())):
            what = "a directory" if path.is_dir() else "not a file" if path.exists() else "a dangling link"
            raise ModelError(f"{path} is {what}; fetch the model again")
