"""Models of transformers: the only file that imports it.

`resolve` makes a local Hugging Face directory of whatever name the user typed; everything else reads that directory.
A GGUF is turned into one once, tensor by tensor, and kept in the cache; a run stands for what it has packed.

`load_network` gives an ordinary `nn.Module`, frozen and in evaluation mode.  In an AQLM checkpoint, ours or anyone's,
each linear layer that has codes becomes an `AdditiveLinear`.  Which layers these are is told by the tensors alone: the
lists of exceptions in the config differ between versions of the format, and the tensors do not.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
import yaml
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from aqlm_cli.artifacts import is_run, read_run
from aqlm_cli.blocks import find_blocks, replace_module
from aqlm_cli.errors import ArtifactError, ModelError
from aqlm_cli.sources import (
    ALIASES,
    WEIGHTS,
    GgufFile,
    ModelSource,
    StoredTensor,
    cached_digest,
    default_cache,
    directory_source,
    find_gguf,
    hub_source,
    model_config,
    save_support_files,
    tensor_index,
)
from aqlm_cli.storage import TensorLayout, storage_errors, stream_tensors, write_file
from aqlm_kernels import AdditiveLinear, from_checkpoint

__all__ = [
    "ModelSource",
    "load_network",
    "load_tokenizer",
    "model_config",
    "resolve",
    "save_support_files",
    "tensor_index",
]


def resolve(
    name: str, revision: str | None = None, trust_remote_code: bool = False, cache_dir: Path | None = None
) -> ModelSource:
    """Find the language model that `name` means: an alias, a .gguf file, a directory, a run, or an id on the hub.

    Raises ModelError if there is none, if it cannot be fetched, or if it is not a decoder-only language model, and
    ArtifactError for a run that has packed nothing yet.
    """
    cache, path = cache_dir or default_cache(), Path(name).expanduser()
    if revision is not None and (name in ALIASES or path.exists()):
        raise ModelError(f"{name} lies on this disk and has no revisions; drop --revision")
    if found := find_gguf(name):
        source = _gguf_source(found, cache)
    elif is_run(path):
        source = dataclasses.replace(directory_source(_packed(path), cache), short_name=path.resolve().name)
    elif path.is_dir():
        source = directory_source(path, cache)
    else:
        source = hub_source(name, revision, with_code=trust_remote_code)
    source = dataclasses.replace(source, name=name, trust_remote_code=trust_remote_code)
    _check_language_model(source)
    return source


def _packed(run_directory: Path) -> Path:
    packed = read_run(run_directory).artifact("packed")
    if packed is None:
        raise ArtifactError(f"{run_directory} has no complete packed/; make it with `aqlm pack {run_directory}`")
    return packed.directory


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source.name} has no tokenizer that can be loaded: {_first_line(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_network(source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in evaluation mode, without gradients; weights are in `dtype`, packed layers work in the type of x."""
    quantization = model_config(source).get("quantization_config")
    method = quantization.get("quant_method") if quantization else None
    with _quiet():
        if method is None:
            network = _load_plain(source, dtype)
        elif method == "aqlm":
            network = _load_additive(source, dtype)
        else:
            raise ModelError(f"{source.name} is quantized already, with {method}; use the model it was made from")
    find_blocks(network)  # or it is refused here
    network.eval()
    network.requires_grad_(False)
    network.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return network


# ------------------------------------------------------------------------------------------------------- configurations


def _load_config(source: ModelSource) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        if "auto_map" in model_config(source) and not source.trust_remote_code:
            reason = "needs Python code of its own; read it, and allow it with --trust-remote-code"
        else:
            reason = f"is of a kind that transformers {transformers.__version__} does not know: {_first_line(error)}"
        raise ModelError(f"{source.name} {reason}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _check_language_model(source: ModelSource) -> None:
    """A decoder that predicts the next token, and not, say, BERT, for which transformers has such a class too."""
    config = _load_config(source)
    causal = getattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", None)
    named = config.architectures or [causal or config.model_type]
    if not any(name == causal or name.endswith("ForCausalLM") for name in named):
        raise ModelError(
            f"{source.name} is not a decoder-only language model but {', '.join(named)}; choose one that generates text"
        )


# -------------------------------------------------------------------------------------------------------------- loading


def _load_plain(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    tensor_index(source.directory)  # refuses what has no safetensors
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=dtype, trust_remote_code=source.trust_remote_code, output_loading_info=True
    )
    network, report = loaded
    assert isinstance(network, PreTrainedModel)
    _refuse_incomplete(source, [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    return network


def _load_additive(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    stored = tensor_index(source.directory)
    config = _load_config(source)
    del config.quantization_config  # or transformers would put the layers of the aqlm package in place of ours
    network = _without_weights(config, dtype, source.trust_remote_code)
    packed = {name.removesuffix(".codes") for name in stored if name.endswith(".codes")}
    for path in sorted(packed):
        replace_module(network, path, _additive_linear(source, network, path, stored))
    others = [name for name in stored if name.rpartition(".")[0] not in packed]
    network.load_state_dict({name: _cast(stored[name].read(name), dtype) for name in others}, strict=False, assign=True)
    network.tie_weights()
    _refuse_incomplete(source, [name for name, parameter in network.named_parameters() if parameter.is_meta])
    if (source.directory / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(source.directory)
    return network


def _without_weights(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The network with parameters that take no memory; what is computed from the config, as rotary tables, is real."""
    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    assert isinstance(network, PreTrainedModel)
    return network


def _additive_linear(
    source: ModelSource, network: nn.Module, path: str, stored: Mapping[str, StoredTensor]
) -> AdditiveLinear:
    """The layer that takes the place of the linear at `path`."""
    names = [name for name in ("codes", "codebooks", "scales", "bias") if f"{path}.{name}" in stored]
    tensors = {name: stored[f"{path}.{name}"].read(f"{path}.{name}") for name in names}
    plain = dict(network.named_modules()).get(path)
    if not isinstance(plain, nn.Linear) or not {"codebooks", "scales"} <= tensors.keys():
        raise ModelError(f"{source.name} has codes for {path}, which is no linear layer that they could restore")
    matrix = from_checkpoint(tensors)
    found, wanted = (matrix.out_features, matrix.in_features), (plain.out_features, plain.in_features)
    if found != wanted:
        raise ModelError(f"{source.name}: the codes of {path} restore a {found} matrix, the model has {wanted}")
    return AdditiveLinear(matrix, tensors.get("bias"))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _refuse_incomplete(source: ModelSource, missing: list[str]) -> None:
    # transformers would fill the gap with random numbers and go on.
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{source.name} lacks a fitting tensor {sorted(missing)[0]}{more}; fetch the model again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars: what is printed is not for the library to say."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ----------------------------------------------------------------------------------------------------------------- GGUF


def _gguf_source(found: GgufFile, cache: Path) -> ModelSource:
    """The converted file, from the cache where it has been converted before."""
    digest = cached_digest(found.path, cache)
    directory = cache / "gguf" / digest
    if not directory.is_dir():
        with storage_errors(directory.parent):
            directory.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=directory.parent))
            try:
                _convert_gguf(found.path, beside)
                if not directory.is_dir():  # or another process was faster
                    beside.rename(directory)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    source = directory_source(directory, cache)
    return dataclasses.replace(
        source,
        identity=f"sha256:{digest}",
        short_name=found.short_name,
        base_model=found.base_model or source.base_model,
    )


def _convert_gguf(path: Path, directory: Path) -> None:
    """Write the model of a GGUF as a Hugging Face directory in 16 bits, with one tensor in memory at a time.

    bfloat16 weights stay what they are.  Everything else becomes float16, which holds the block formats of GGUF (an
    integer times a float16 scale, in the main) ten times more exactly than bfloat16: to 2e-4 in relative RMS for Q4_1.
    """
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        network = _without_weights(config, torch.float32, trust_remote_code=False)
        reader = gguf.GGUFReader(path)
        tensors = _gguf_tensors(path, reader, network)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{path} cannot be converted: {_first_line(error)}") from error
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
    write_file(directory / "README.md", _gguf_card(reader).encode())


def _gguf_tensors(
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
    return tensors


def _gguf_card(reader: gguf.GGUFReader) -> str:
    """A model card with what the file says of its licence and origin."""
    keys = {"license": "general.license", "base_model": "general.base_model.0.repo_url"}
    facts = {key: reader.fields[field].contents() for key, field in keys.items() if field in reader.fields}
    if "base_model" in facts:
        facts["base_model"] = facts["base_model"].removeprefix("https://huggingface.co/")
    return f"---\n{yaml.safe_dump(facts)}---\n"
