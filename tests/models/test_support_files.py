"""What is packed, fetched and digested beside the weights: the files of tokenizer, templates and processor."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import commands, tiny_models
from huggingface_hub.utils import filter_repo_objects

from aqlm_cli.errors import ArtifactError, ModelError
from aqlm_cli.models import load_tokenizer, resolve, save_support_files
from aqlm_cli.models import source as model_source
from aqlm_cli.models.support_files import FETCHED, is_support_file, support_files
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages.verify import verify
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.runs.directory import open_run
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.run_file import build_config

CHAT = [{"role": "user", "content": "hello"}]
TEMPLATES = {"default": "{{ messages[0].content }}!", "tool_use": "T{{ messages[0].content }}", "rag": "R"}

REPOSITORY = [
    *("config.json", "README.md", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "code.py"),
    *("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "merges.txt", "chat_template.jinja", "tekken.json"),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/old/a.jinja"),
    *("additional_chat_templates/model.safetensors", "onnx/model.onnx", "onnx/config.json", "fp8/model.safetensors"),
    *("original/tokenizer.model", "original/params.json", "other/tool_use.jinja", "model.gguf"),
]
"""Files as repositories of the hub have them, some of them in folders for other programs."""


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., model_source.ModelSource]:
    return lambda name, **options: resolve(str(name), cache_dir=tmp_path / "cache", **options)


def save_with_templates(directory: Path, form: str) -> Path:
    """A tiny model whose tokenizer has three templates, in one of the forms that such files have."""
    tiny_models.save("llama", directory)
    (directory / "chat_template.jinja").unlink()
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = dict(TEMPLATES)
    tokenizer.save_pretrained(directory, save_jinja_files=form == "folder")
    return directory


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("form", ["folder", "list"])
def test_packed_support_files_have_every_chat_template(form: str, tmp_path: Path, find: Any) -> None:
    source = find(save_with_templates(tmp_path / "model", form))
    assert (source.directory / "additional_chat_templates" / "tool_use.jinja").is_file() == (form == "folder")
    (tmp_path / "packed").mkdir()
    save_support_files(source, tmp_path / "packed")
    shutil.copy(source.directory / "config.json", tmp_path / "packed")
    original, copy = load_tokenizer(source), load_tokenizer(find(tmp_path / "packed"))
    assert copy.chat_template == original.chat_template == TEMPLATES
    assert copy.apply_chat_template(CHAT, chat_template="tool_use", tokenize=False) == "Thello"


def test_the_manifest_lists_and_verify_compares_the_folder_of_templates(tmp_path: Path, find: Any) -> None:
    source = find(save_with_templates(tmp_path / "model", "folder"))
    run = open_run(tmp_path / "run", build_config(None, None, {"model": str(source.directory)}))
    with run.stage(StageKey(PACK, {}, {})) as stage:
        save_support_files(source, stage.directory)
        packed = stage.publish({})
    folder = packed.directory / "additional_chat_templates"
    nested = {name for name in packed.manifest.files if "/" in name}
    assert nested == {f"{folder.name}/rag.jinja", f"{folder.name}/tool_use.jinja"}
    assert verify(make_job(run.config, run.path)).files == len(packed.manifest.files)
    (folder / "rag.jinja").write_text("S")
    with pytest.raises(ArtifactError, match=r"rag\.jinja is damaged"):
        verify(make_job(run.config, run.path))
    (folder / "rag.jinja").unlink()
    with pytest.raises(ArtifactError, match=r"rag\.jinja is missing"):
        open_artifact(packed.directory, "packed")


@pytest.mark.parametrize("name", ["additional_chat_templates/rag.jinja", "qwen.tiktoken", "tokenizer.json"])
def test_the_identity_of_a_directory_covers_what_its_tokenizer_reads(name: str, tmp_path: Path, find: Any) -> None:
    directory = save_with_templates(tmp_path / "model", "folder")
    (directory / "qwen.tiktoken").write_text("IQ== 0")
    identity = find(directory).identity
    (directory / name).write_text((directory / name).read_text() + " ")
    assert find(directory).identity != identity


# --------------------------------------------------------------------------------------------------- names of the files


def names_that_tokenizers_read() -> Iterator[str]:
    """The values of every dictionary VOCAB_FILES_NAMES or `vocab_files_names` in the source of transformers."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/tokenization*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for name in {"VOCAB_FILES_NAMES", "vocab_files_names"} & assigned.keys():
            values = assigned[name].values if isinstance(assigned[name], ast.Dict) else []
            for value in values:
                value = assigned.get(value.id, value) if isinstance(value, ast.Name) else value
                if isinstance(value, ast.Constant):
                    yield str(value.value)


def test_every_file_that_a_tokenizer_of_transformers_names_is_packed_and_fetched() -> None:
    names = set(names_that_tokenizers_read())
    assert {"vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "bpe.codes", "target.spm"} <= names
    assert len(names) > 20
    assert [name for name in sorted(names) if not is_support_file(name)] == []
    assert set(filter_repo_objects(sorted(names), allow_patterns=list(FETCHED))) == names


def test_files_of_processors_and_of_tokenizers_with_code_are_packed_and_weights_and_notes_are_not(
    tmp_path: Path,
) -> None:
    wanted = [
        *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
        *("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "tiktoken.model", "rwkv_vocab_v20230424.txt"),
        *("20B_tokenizer.json", "additional_chat_templates/a b.jinja"),
    ]
    others = [
        *("config.json", "README.md", "notes.txt", "model.safetensors", "tokenizer.safetensors", "vocab.pt"),
        *("tokenizer_custom.py", "manifest.json", "trainer_state.json", "model.safetensors.index.json"),
        *("additional_chat_templates/notes.txt", "other/tool_use.jinja", "original/tokenizer.model"),
    ]
    for name in [*wanted, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert {path.as_posix() for path in support_files(tmp_path)} == set(wanted)


def test_code_is_packed_with_the_flag_alone(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "tokenization_own.py").write_text("")
    for flag in False, True:
        target = tmp_path / str(flag)
        target.mkdir()
        save_support_files(find(directory, trust_remote_code=flag), target)
        assert (target / "tokenization_own.py").is_file() == flag


# ------------------------------------------------------------------------------------------------------------- the hub


def fetched_with(find: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[str]:
    """What the calls together take of REPOSITORY, by the hub client's own reading of their patterns."""
    taken: set[str] = set()
    commits = []

    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        commits.append(revision)
        taken.update(
            filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns),
        )
        return str(tmp_path / "model")

    tiny_models.save("llama", tmp_path / "model")
    monkeypatch.setattr(model_source, "snapshot_download", download)
    find("someone/Tiny", revision="v2", **options)
    assert commits == ["v2", "model"]  # both of one commit, whatever happens to the branch meanwhile
    return taken


def test_the_hub_gives_templates_in_their_folder_and_nothing_else_of_folders(
    tmp_path: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {
        *("config.json", "README.md", "model.safetensors", "tokenizer.json", "tokenizer.model", "qwen.tiktoken"),
        *("merges.txt", "chat_template.jinja", "tekken.json", "additional_chat_templates/tool_use.jinja"),
    }
    assert fetched_with(find, tmp_path, monkeypatch) == plain
    assert fetched_with(find, tmp_path, monkeypatch, trust_remote_code=True) == plain | {"code.py"}
    assert fetched_with(find, tmp_path, monkeypatch, with_weights=False) == plain - {"model.safetensors"}


def test_a_fetched_template_is_read_by_the_tokenizer(tmp_path: Path, find: Any, monkeypatch: Any) -> None:
    directory = save_with_templates(tmp_path / "snapshots" / "0a1b2c", "folder")
    monkeypatch.setattr(model_source, "snapshot_download", lambda *_, **__: str(directory))
    assert load_tokenizer(find("someone/Tiny")).chat_template == TEMPLATES
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings


# -------------------------------------------------------------------------------------------------- names of no file


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("chat_template.jinja", "additional_chat_templates/rag.jinja", "code.py"),
    ],
)
@pytest.mark.parametrize(("kind", "words"), [("link", "a dangling link"), ("directory", "a directory")])
def test_a_name_that_leads_to_no_file_is_refused_by_every_command(
    kind: str, words: str, name: str, tmp_path: Path, find: Any
) -> None:
    path = save_with_templates(tmp_path / "model", "folder") / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "gone") if kind == "link" else path.mkdir()
    line = f"{path} is {words}; fetch the model again"
    assert commands.refused("plan", str(tmp_path / "model")) == f"error: {line}\n"
    with pytest.raises(ModelError, match=re.escape(line)):
        find(tmp_path / "model")


def test_folders_and_links_beside_a_model_change_nothing(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    before = find(directory).identity
    (directory / "tokenizer").mkdir()
    (directory / "onnx").symlink_to(tmp_path / "gone")
    assert find(directory).identity == before


def test_a_tokenizer_behind_a_dangling_link_is_refused(tmp_path: Path, find: Any) -> None:
    directory = tiny_models.save("llama", tmp_path / "model")
    (directory / "qwen.tiktoken").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"qwen\.tiktoken is a dangling link"):
        find(directory)


# ----------------------------------------------------------------------------------------------- settings that are none


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_invalid_generation_settings_are_refused_by_the_plan(content: str, tmp_path: Path) -> None:
    path = tiny_models.save("llama", tmp_path / "model") / "generation_config.json"
    path.write_text(content)
    line = f"error: {path} is not a JSON object; fetch the model again\n"
    assert commands.refused("plan", str(tmp_path / "model")) == line


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "words"), [("[]", "is not a JSON object"), ("{", "cannot be read .Expecting property name")]
)
def test_the_file_of_a_tokenizer_that_is_damaged_is_named(
    content: str, words: str, name: str, tmp_path: Path, find: Any
) -> None:
    path = tiny_models.save("llama", tmp_path / "model") / name
    path.write_text(content)
    with pytest.raises(ModelError, match=f"^{re.escape(str(path))} {words}.*; fetch the model"):
        load_tokenizer(find(tmp_path / "model"))
