"""Conversion of a GGUF file to a Hugging Face directory, once, tensor by tensor; cached by the file's digest."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from aqlm_cli.errors import AqlmError, ModelError, shortened
from aqlm_cli.models.gguf_header import GgufTensor
from aqlm_cli.models.gguf_parts import WholeGguf, digest_of, parts_of, read_whole
from aqlm_cli.models.gguf_positions import TENSORS as POSITIONS
from aqlm_cli.models.gguf_positions import FilePositions, set_positions
from aqlm_cli.models.gguf_settings import chat_templates, set_shapes, zero_biases
from aqlm_cli.models.gguf_types import Blocks, check_types, read_values
from aqlm_cli.models.loading import first_line, quiet, without_weights
from aqlm_cli.models.source import GgufFile, ModelSource, directory_source
from aqlm_cli.models.untrusted_config import at_most
from aqlm_cli.models.weight_files import SHARD, WEIGHTS
from aqlm_cli.runs.files import TensorLayout, storage_errors, stream_tensors, write_file

FORM = 2
"""Version of the conversion, raised when its result changes; the first had no scaled position embeddings."""


def gguf_source(found: GgufFile, cache: Path) -> ModelSource:
    """The converted file, from the cache if it was converted before."""
    parts = parts_of(found.path)
    digest = digest_of(parts, cache)
    directory = cache / "gguf" / f"{digest}-{FORM}"
    if not directory.is_dir():
        with storage_errors(directory.parent):
            directory.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=directory.parent))
            try:
                with quiet(), _foreign_errors(found.path):
                    _convert(read_whole(parts), beside)
                if not directory.is_dir():  # or another process was faster
                    beside.rename(directory)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    source = directory_source(directory, cache)
    split = SHARD.fullmatch(found.path.name) if len(parts) > 1 else None
    return dataclasses.replace(
        source,
        cached_identity=f"sha256:{digest}",
        short_name=split["stem"] if split else found.short_name,
        base_model=found.base_model or source.base_model,
    )


@contextlib.contextmanager
def _foreign_errors(path: Path) -> Iterator[None]:
    """ModelError for any error that gguf, transformers or tokenizers raise for a damaged file."""
    try:
        yield
    except (AqlmError, OSError):  # the latter is from writing, which the caller names
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be converted: {first_line(error)}") from error


def _convert(whole: WholeGguf, directory: Path) -> None:
    """Write the model of a GGUF as a Hugging Face directory in 16 bits, with one tensor in memory at a time.

    bfloat16 weights stay as they are.  Everything else becomes float16, which holds the block formats of GGUF (an
    integer times a float16 scale, in the main) ten times more exactly than bfloat16: to 2e-4 in relative RMS for Q4_1.
    """
    path, blocks = whole.path, check_types(whole.tensors)
    with tempfile.TemporaryDirectory(dir=directory) as beside:
        header = Path(beside) / "header.gguf"
        write_file(header, whole.header_file())
        try:
            config = AutoConfig.from_pretrained(beside, gguf_file=header.name)
            tokenizer = AutoTokenizer.from_pretrained(beside, gguf_file=header.name)
            fields = {key: field.contents() for key, field in gguf.GGUFReader(header).fields.items()}
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # from writing
                raise
            # For a damaged string transformers reports that the header is a config file and not JSON.
            raise ModelError(f"the settings of {path} are damaged ({_cause(error)}); fetch it again") from error
    architecture = fields["general.architecture"]
    settings = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    set_shapes(settings, whole.tensors, config)
    with at_most(2 * len(whole.tensors), str(path)):  # one for each, and what is tied to another
        network = without_weights(config)
    factors = {
        tensor.name: read_values(tensor, blocks[tensor.name]).astype("float64").reshape(-1)
        for tensor in whole.tensors
        if tensor.name in POSITIONS
    }
    set_positions(FilePositions(str(path), settings, factors), config, network)
    _write_weights(path, _tensors(whole, architecture, network), blocks, network, config, directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer.chat_template = chat_templates(fields, tokenizer.chat_template)
    tokenizer.save_pretrained(directory)
    write_file(directory / "README.md", _card(fields).encode())


def _cause(error: BaseException) -> str:
    """The first error of the chain; the message of the last one names a temporary file."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


def _write_weights(
    path: Path,
    tensors: Mapping[str, Place],
    blocks: Mapping[str, Blocks],
    network: PreTrainedModel,
    config: PreTrainedConfig,
    directory: Path,
) -> None:
    """Write the weights of the network, and its config."""
    kinds = {place[0].kind for place in tensors.values() if place is not None}
    dtype = torch.bfloat16 if gguf.GGMLQuantizationType.BF16 in kinds else torch.float16
    shapes = {name: tuple(parameter.shape) for name, parameter in network.state_dict().items()}

    def read(name: str) -> Tensor:
        place = tensors[name]
        if place is None:
            return torch.zeros(shapes[name], dtype=dtype)
        tensor, processor = place
        weights = processor.process(weights=read_values(tensor, blocks[tensor.name]), name=tensor.name).weights
        rounded = torch.from_numpy(weights.copy()).to(dtype).reshape(shapes[name])
        if not rounded.isfinite().all():
            raise ModelError(f"{path}: {tensor.name} holds values that are not finite in {dtype}")
        return rounded

    layouts = {name: TensorLayout(dtype, shapes[name]) for name in tensors}
    stream_tensors(directory / WEIGHTS, layouts, read, metadata={"format": "pt"})
    config.architectures = [type(network).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)


Place: TypeAlias = tuple[GgufTensor, TensorProcessor] | None
"""A tensor of the file, and the function that converts it to transformers' order; None for a bias that is zero."""


def _tensors(whole: WholeGguf, architecture: str, network: PreTrainedModel) -> dict[str, Place]:
    """The place in the file of each tensor of the network."""
    kind: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=network.config.to_dict())
    names = get_gguf_hf_weights_map(network, processor)
    stored = [tensor for tensor in whole.tensors if tensor.name not in POSITIONS]
    strange = [tensor for tensor in stored if tensor.name not in names]
    if strange:
        raise ModelError(
            f"{strange[0].path} holds {shortened(strange[0].name)}, which {architecture} in transformers does not use; "
            f"use the model in safetensors"
        )
    tensors: dict[str, Place] = {names[tensor.name]: (tensor, processor) for tensor in stored}
    missing = network.state_dict().keys() - tensors.keys() - network.all_tied_weights_keys.keys()
    zero = zero_biases(missing, stored)
    if missing - zero:
        lacking = sorted(missing - zero)[0]
        raise ModelError(f"{whole.path} lacks {lacking}; it may hold experts in a form that cannot be converted")
    shapes = {name: parameter.shape for name, parameter in network.state_dict().items()}
    for tensor in stored:
        wanted = shapes[names[tensor.name]]
        if tensor.count != wanted.numel():
            raise ModelError(f"{tensor.path}: {tensor.name} has the shape {list(tensor.shape)}, not {list(wanted)}")
    return {**tensors, **dict.fromkeys(zero)}


def _card(fields: Mapping[str, Any]) -> str:
    """A model card with the file's licence and origin."""
    keys = {"license": "general.license", "base_model": "general.base_model.0.repo_url"}
    facts = {key: fields[field] for key, field in keys.items() if field in fields}
    if "base_model" in facts:
        facts["base_model"] = facts["base_model"].removeprefix("https://huggingface.co/")
    return f"---\n{yaml.safe_dump(facts)}---\n"
