"""Loading a network from a directory: weights by transformers, codes by this package.

In an AQLM checkpoint, of any origin, each quantized linear layer becomes an `AdditiveLinear`. The tensors alone decide
which these are: the lists of exceptions in the config differ between versions of the format, and the tensors do not.
Everything else is left to transformers, which maps the names in the files to those of modules, and fuses tensors.
Its extension point for quantized models (skip_layers.py) keeps it from filling the quantized layers. A native
checkpoint is loaded by transformers as a whole, with the quantizer that aqlm_kernels registers there.

transformers' networks take a second to import, and not every command needs one: they are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
import transformers
from torch import nn

from aqlm_cli.errors import AqlmError, ModelError, shortened
from aqlm_cli.models.blocks import count_parameters, find_blocks, replace_module
from aqlm_cli.models.gaps import why_unfit
from aqlm_cli.models.names import places_of_codes
from aqlm_cli.models.plain_linear import is_plain
from aqlm_cli.models.quantization import is_native, is_quantized, refuse_quantized
from aqlm_cli.models.source import ModelSource, StoredTensor, model_config, tensor_index
from aqlm_cli.models.untrusted_config import (
    MOST_PARTS,
    NUMBERS_PER_BYTE,
    PARAMETERS_PER_TENSOR,
    at_most,
    refuse_untrusted,
)
from aqlm_cli.models.weight_files import has_weights, read_settings
from aqlm_cli.runs.files import TensorLayout
from aqlm_kernels import AdditiveLinear, from_checkpoint

Module = TypeVar("Module", bound=nn.Module)
Network: TypeAlias = "transformers.PreTrainedModel"  # not imported before there is one


def load_network(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """The model in evaluation mode, without gradients; weights in `dtype`, packed layers compute in the type of x."""
    with quiet():
        if is_native(source):
            _skeleton(source, load_config(source))  # refuses networks larger than their files
            network = _load(source, dtype)
        elif is_quantized(source):
            network = _load_quantized(source, dtype)
        else:
            load_skeleton(source)  # refuses other quantized models, and networks larger than their files
            network = _load(source, dtype)
    find_blocks(network)  # refuses a network without blocks
    return _prepared(network, device)


def load_outside(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """The model without the weights of its blocks, which have names and shapes alone; `BlockLoader` loads the weights.

    A walk through a model that is larger than memory starts from it.
    """
    skeleton = load_skeleton(source)
    paths = find_blocks(skeleton).paths
    network = load_without(source, paths, dtype, device)
    for path in paths:
        replace_module(network, path, skeleton.get_submodule(path).eval().to("meta"))  # XLNet creates weights in memory
    return network


def load_without(
    source: ModelSource,
    paths: Sequence[str],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    kept: Collection[str] = (),
) -> transformers.PreTrainedModel:
    """The model without the weights of the modules at `paths`, which are neither read nor listed; those `kept` are."""
    with quiet():
        return _prepared(_load_without(source, load_config(source), paths, dtype, kept), device)


class BlockLoader:
    """Loader of single blocks by index, each equal to that of `load_network`; nothing else is read.

    All of them are filled into one network without weights, so that the modules of the model are made once, not once
    for each block.
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        from aqlm_cli.models.skip_layers import Refillable

        self._source, self._dtype, self._device = source, dtype, device
        self._skeleton = load_skeleton(source)
        self._paths = find_blocks(self._skeleton).paths
        self._network = Refillable(type(self._skeleton))

    def __call__(self, index: int) -> nn.Module:
        path = self._paths[index]
        # A block may share weights with an earlier one; the files have them under either name.
        tied = self._skeleton.all_tied_weights_keys.items()
        sharing = {name for pair in tied if _inside(path, pair) for name in pair}
        kept = [path, *sorted({name.rpartition(".")[0] for name in sharing if not name.startswith(f"{path}.")})]
        config, kind = load_config(self._source), self._network.network_type
        if type(config) is not type(self._skeleton.config):  # that of a multimodal model, which holds its decoder's
            config = config.get_text_config()

        def load() -> transformers.PreTrainedModel:
            return _load_without(self._source, config, [""], self._dtype, kept, kind)

        with quiet():
            block = self._network.filled(kept, load)
        return _prepared(block, self._device)


def _inside(path: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in names)


def load_skeleton(source: ModelSource) -> transformers.PreTrainedModel:
    """The model with modules, names and shapes, but no weights: all that a plan needs. Refuses quantized models."""
    refuse_quantized(source)
    return _skeleton(source, load_config(source))


def saved_layouts(network: transformers.PreTrainedModel) -> dict[str, TensorLayout]:
    """Layouts of the tensors that files of this network would hold, in 16 bits, without a tied head."""
    configured = network.config.dtype
    dtype = configured if isinstance(configured, torch.dtype) and configured.itemsize == 2 else torch.float16
    tied = network.all_tied_weights_keys.keys()
    return {
        name: TensorLayout(dtype, tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
        if name not in tied
    }


def load_tokenizer(source: ModelSource) -> transformers.PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer file raises errors of any kind
        for path in (source.directory / name for name in ("tokenizer_config.json", "tokenizer.json")):
            if path.is_file():
                read_settings(path)  # names a damaged file
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    return tokenizer


def load_config(source: ModelSource) -> transformers.PreTrainedConfig:
    refuse_untrusted(source)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                source.directory, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # transformers computes with unchecked values: TypeError, ZeroDivisionError, anything
        settings, version = model_config(source), f"transformers {transformers.__version__}"
        if "auto_map" in settings and not source.trust_remote_code:
            reason = " needs its own Python code; read the code, then allow it with --trust-remote-code"
        elif isinstance(settings.get("model_type"), str) and settings["model_type"] in transformers.CONFIG_MAPPING:
            reason = f": {version} refuses a value in its config.json: {first_line(error)}"
        else:
            reason = f" has an architecture that {version} does not support: {first_line(error)}"
        raise ModelError(f"{source.name}{reason}") from error
    assert isinstance(config, transformers.PreTrainedConfig)
    return config


def without_weights(
    config: transformers.PreTrainedConfig, trust_remote_code: bool = False
) -> transformers.PreTrainedModel:
    """The network of a config, with parameters on the meta device."""
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    assert isinstance(network, transformers.PreTrainedModel)
    return network


def _skeleton(source: ModelSource, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """`without_weights` for an untrusted config.json; ModelError if its files are too small for the network."""
    stored = tensor_index(source.directory) if has_weights(source.directory) else {}
    try:
        with quiet(), at_most(PARAMETERS_PER_TENSOR * len(stored) or MOST_PARTS, source.name):
            network = without_weights(config, source.trust_remote_code)
    except AqlmError:
        raise
    except Exception as error:  # negative widths, heads that do not divide them, unknown functions
        raise ModelError(f"{source.name}: its config.json gives no valid network ({first_line(error)})") from error
    parameters, files = count_parameters(network), {tensor.file for tensor in stored.values()}
    size = sum(path.stat().st_size for path in files)
    if files and parameters > NUMBERS_PER_BYTE * size:
        raise ModelError(
            f"{source.name}: its config.json asks for {parameters} weights, but its files have {size} bytes"
        )
    return network


def first_line(error: Exception) -> str:
    """Message of an error in one line: its first, with the next ones if that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = next((at for at, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    message = " ".join(lines[:count])
    if isinstance(error, KeyError) or not message:  # a KeyError holds the key alone
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return shortened(message, 300)


# -------------------------------------------------------------------------------------------------------------- loading


def _prepared(module: Module, device: str | torch.device) -> Module:
    """The module in evaluation mode, without gradients, on the device."""
    return module.eval().requires_grad_(False).to(device)


def _load(
    source: ModelSource, dtype: torch.dtype, network_type: Any = None, **options: Any
) -> transformers.PreTrainedModel:
    """The network by transformers. `network_type` None: the class that config.json means."""
    tensor_index(source.directory)  # refuses a model without safetensors
    settings = {"dtype": dtype, "trust_remote_code": source.trust_remote_code, "use_safetensors": True, **options}
    try:
        loaded: Any = (network_type or transformers.AutoModelForCausalLM).from_pretrained(
            source.directory, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # config.json may hold anything
        raise ModelError(f"{source.name} cannot be loaded: {first_line(error)}") from error
    network, report = loaded
    assert isinstance(network, transformers.PreTrainedModel)
    fault = why_unfit(report)  # transformers would fill a gap with random values and continue
    if fault is not None:
        raise ModelError(f"{source.name} {fault}")
    return network


def _load_without(
    source: ModelSource,
    config: transformers.PreTrainedConfig,
    paths: Sequence[str],
    dtype: torch.dtype,
    kept: Collection[str] = (),
    network_type: type[transformers.PreTrainedModel] | None = None,
) -> transformers.PreTrainedModel:
    from aqlm_cli.models.skip_layers import leaving_out

    config.quantization_config = leaving_out(paths, kept)
    return _load(source, dtype, network_type, config=config)


def _load_quantized(source: ModelSource, dtype: torch.dtype) -> transformers.PreTrainedModel:
    config, stored = load_config(source), tensor_index(source.directory)
    skeleton = _skeleton(source, config)
    plain, places = dict(skeleton.named_modules()), places_of_codes(skeleton, stored)
    layers = {path: _additive_linear(source, plain.get(path), path, names, stored) for path, names in places.items()}
    network = _load_without(source, config, sorted(places), dtype)
    for path, layer in layers.items():
        replace_module(network, path, layer)
    return network


def _additive_linear(
    source: ModelSource,
    plain: nn.Module | None,
    path: str,
    names: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
) -> AdditiveLinear:
    """The layer that replaces `plain` at `path`; `names` are those of its tensors in the files."""
    tensors = {last: stored[name].read(name) for last, name in names.items()}
    if plain is None or not is_plain(plain) or not {"codebooks", "scales"} <= tensors.keys():
        raise ModelError(f"{source.name} has codes for {path}, which is not a linear layer that they can replace")
    groups = plain.in_features // tensors["codebooks"].shape[-1]
    if tuple(tensors["codes"].shape[:2]) == (groups, plain.out_features) != (plain.out_features, groups):
        raise ModelError(
            f"{source.name}: the codes of {path} are transposed, as the package aqlm leaves them after a matmul on a "
            "CPU; load the checkpoint that this one was saved from"
        )
    matrix = from_checkpoint(tensors)
    shape, wanted = (matrix.out_features, matrix.in_features), (plain.out_features, plain.in_features)
    if shape != wanted:
        raise ModelError(f"{source.name}: the codes of {path} give a matrix {shape}, the model has {wanted}")
    return AdditiveLinear(matrix, tensors.get("bias"))


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and reports: this package alone prints."""
    logging = transformers.utils.logging
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
