"""A GGUF file becomes a Hugging Face directory: once, tensor by tensor, kept in the cache by the file's digest."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from aqlm_cli.errors import AqlmError, ModelError
from aqlm_cli.model.bounds import at_most
from aqlm_cli.model.gguf_header import check_header
from aqlm_cli.model.loading import first_line, quiet, without_weights
from aqlm_cli.sources import GgufFile, ModelSource, cached_digest, directory_source
from aqlm_cli.storage import TensorLayout, storage_errors, stream_tensors, write_file
from aqlm_cli.weight_files import WEIGHTS


def gguf_source(found: GgufFile, cache: Path) -> ModelSource:
    """The converted file, from the cache where it has been converted before."""
    digest = cached_digest(found.path, cache)
    directory = cache / "gguf" / digest
    if not directory.is_dir():
        with storage_errors(directory.parent):
            directory.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=directory.parent))
            try:
                with quiet(), _foreign_errors(found.path):
                    _convert(found.path, beside)
                if not directory.is_dir():  # or another process was faster
                    beside.rename(directory)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    source = directory_source(directory, cache)
    return dataclasses.replace(
        source,
        known_identity=f"sha256:{digest}",
        short_name=found.short_name,
        base_model=found.base_model or source.base_model,
    )


@contextlib.contextmanager
def _foreign_errors(path: Path) -> Iterator[None]:
    """Whatever gguf, transformers and tokenizers say to a damaged file, in one line: they raise errors of any kind."""
    try:
        yield
    except (AqlmError, OSError):  # the latter is from writing, which the caller names
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be converted: {first_line(error)}") from error


def _convert(path: Path, directory: Path) -> None:
    """Write the model of a GGUF as a Hugging Face directory in 16 bits, with one tensor in memory at a time.

    bfloat16 weights stay what they are.  Everything else becomes float16, which holds the block formats of GGUF (an
    integer times a float16 scale, in the main) ten times more exactly than bfloat16: to 2e-4 in relative RMS for Q4_1.
    """
    stored = check_header(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with at_most(2 * stored, str(path)):  # one for each, and what is tied to another
            network = without_weights(config)
        reader = gguf.GGUFReader(path)
        tensors = _tensors(path, reader, network)
    except OSError as error:
        raise ModelError(f"{path} cannot be converted: {first_line(error)}") from error
    kinds = {tensor.tensor_type for tensor, _ in tensors.values()}
    dtype = torch.bfloat16 if gguf.GGMLQuantizationType.BF16 in kinds else torch.float16
    shapes = {name: tuple(parameter.shape) for name, parameter in network.state_dict().items()}

    def read(name: str) -> Tensor:
        tensor, processor = tensors[name]
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights = processor.process(weights=weights, name=tensor.name).weights
        rounded = torch.from_numpy(weights.copy()).to(dtype).reshape(shapes[name])
        if not rounded.isfinite().all():
            raise ModelError(f"{path}: {tensor.name} holds values that are no numbers in {dtype}")
        return rounded

    layouts = {name: TensorLayout(dtype, shapes[name]) for name in tensors}
    stream_tensors(directory / WEIGHTS, layouts, read, metadata={"format": "pt"})
    config.architectures = [type(network).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_file(directory / "README.md", _card(reader).encode())


def _tensors(
    path: Path, reader: gguf.GGUFReader, network: PreTrainedModel
) -> dict[str, tuple[gguf.ReaderTensor, TensorProcessor]]:
    """For each tensor of the network its place in the file, and what brings it into transformers' order."""
    architecture = reader.fields["general.architecture"].contents()
    kind: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=network.config.to_dict())
    names = get_gguf_hf_weights_map(network, processor)
    strange = [tensor.name for tensor in reader.tensors if tensor.name not in names]
    if strange:
        raise ModelError(f"{path} holds {strange[0]}, for which {architecture} of transformers has no place")
    tensors = {names[tensor.name]: (tensor, processor) for tensor in reader.tensors}
    missing = network.state_dict().keys() - tensors.keys() - network.all_tied_weights_keys.keys()
    if missing:
        raise ModelError(f"{path} lacks {sorted(missing)[0]}; it may hold experts in a form that cannot be converted")
    shapes = {name: parameter.shape for name, parameter in network.state_dict().items()}
    for name, (tensor, _) in tensors.items():
        if math.prod(tensor.shape.tolist()) != shapes[name].numel():
            raise ModelError(f"{path}: {tensor.name} has the shape {tensor.shape.tolist()}, not {list(shapes[name])}")
    return tensors


def _card(reader: gguf.GGUFReader) -> str:
    """A model card with what the file says of its licence and origin."""
    keys = {"license": "general.license", "base_model": "general.base_model.0.repo_url"}
    facts = {key: reader.fields[field].contents() for key, field in keys.items() if field in reader.fields}
    if "base_model" in facts:
        facts["base_model"] = facts["base_model"].removeprefix("https://huggingface.co/")
    return f"---\n{yaml.safe_dump(facts)}---\n"
