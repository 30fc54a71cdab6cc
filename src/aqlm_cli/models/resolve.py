"""Resolution of a model's name: an alias, a .gguf file, a directory, a run, or an id on the hub.

The name of a run resolves to its packed model, so every command that takes a model takes a run, too.
"""

from __future__ import annotations

import dataclasses
import os  # whose questions about paths answer no where pathlib's raise: a name too long, a directory closed to us
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import transformers

from aqlm_cli.errors import ArtifactError, ModelError
from aqlm_cli.models.loading import load_config
from aqlm_cli.models.source import (
    ALIASES,
    ModelSource,
    default_cache,
    directory_source,
    end_tokens,
    find_gguf,
    hub_source,
    model_config,
)
from aqlm_cli.runs.directory import RunDirectory, is_run, read_run
from aqlm_cli.spec.config import RunConfig


def resolve(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    with_weights: bool = True,
) -> ModelSource:
    """Find the language model with this name; without weights, nothing large is downloaded from the hub.

    Raises ModelError if it does not exist, cannot be downloaded, or is not a decoder-only language model, and
    ArtifactError for a run without a packed model.
    """
    cache, path = cache_dir or default_cache(), Path(os.path.expanduser(name))
    if revision is not None and (name in ALIASES or os.path.exists(path)):
        raise ModelError(f"{name} is a local model and has no revisions; drop --revision")
    if found := find_gguf(name):
        from aqlm_cli.models.gguf_import import gguf_source  # imports transformers' networks, in a second

        source = gguf_source(found, cache)
    elif is_run(path):
        packed = read_run(path).current("packed").directory
        source = dataclasses.replace(directory_source(packed, cache), short_name=path.resolve().name)
    elif os.path.isdir(path):
        source = directory_source(path, cache)
    else:
        source = hub_source(name, revision, cache, trust_remote_code, with_weights)
    source = dataclasses.replace(source, name=name, trust_remote_code=trust_remote_code)
    _check_language_model(source)
    end_tokens(source)  # refuses an invalid generation_config.json
    return source


@dataclass(frozen=True)
class ResolvedModel:
    """A model by its name: resolved when its source is first asked for, and only once."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    with_weights: bool = True

    @cached_property
    def source(self) -> ModelSource:
        """The files. Raises as `resolve` does."""
        return resolve(self.name, self.revision, self.trust_remote_code, with_weights=self.with_weights)


def base_model_of(config: RunConfig, with_weights: bool = True) -> ResolvedModel:
    """The model that a run file names."""
    return ResolvedModel(config.model, config.revision, config.trust_remote_code, with_weights)


@dataclass(frozen=True)
class Subject:
    """The target of a command: a model, or the packed checkpoint of a run, which has a base model."""

    source: ModelSource
    run: RunDirectory | None = None
    base_model: ResolvedModel | None = None

    def base(self) -> ModelSource | None:
        """The model that the run was made from; None for a model that stands for itself."""
        if self.run is None or self.base_model is None:
            return None
        refuse_other_model(self.run, self.base_model.source)
        return self.base_model.source


def find_subject(
    name: str, revision: str | None = None, trust_remote_code: bool = False, base_model: ResolvedModel | None = None
) -> Subject:
    """`revision` is that of a model on the hub; a run knows its own. `base_model` is that of the run, if resolved."""
    if not is_run(Path(name)):
        return Subject(resolve(name, revision, trust_remote_code))
    run = read_run(Path(name))
    source = resolve(name, None, trust_remote_code or run.config.trust_remote_code)
    return Subject(source, run, base_model or base_model_of(run.config))


def refuse_other_model(run: RunDirectory, source: ModelSource) -> None:
    """ArtifactError where the run was made from another model than `source`."""
    quantized = run.artifact("quantized")
    if quantized is not None and quantized.manifest.parents.get("model") != source.identity:
        raise ArtifactError(
            f"{quantized.directory} was made from {quantized.manifest.parents.get('model')}, and {run.config.model} is "
            f"now {source.identity}; bring the old model back, or redo the run with --overwrite"
        )


def _check_language_model(source: ModelSource) -> None:
    """Raise ModelError unless the model is a decoder: transformers has a causal class for BERT, too."""
    settings = model_config(source)
    kind, named = settings.get("model_type"), settings.get("architectures")
    supported = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if supported and isinstance(named, list) and any(str(name).endswith("ForCausalLM") for name in named):
        return  # without transformers' own config, which imports its networks
    config = load_config(source)
    causal = getattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", None)
    named = config.architectures
    names = [str(name) for name in named] if isinstance(named, list) and named else [str(causal or config.model_type)]
    # For a multimodal model, transformers builds the decoder from its config.
    wider = causal is not None and not config.is_encoder_decoder
    endings = ("ForCausalLM", "ForConditionalGeneration") if wider else ("ForCausalLM",)
    # A model saved without its head is tied to its embeddings, or lacks one, which loading reports.
    body = getattr(transformers.MODEL_MAPPING.get(type(config), None), "__name__", None) if wider else None
    if not any(name in (causal, body) or name.endswith(endings) for name in names):
        raise ModelError(
            f"{source.name} is not a decoder-only language model but {', '.join(names)}; choose one that generates text"
        )
