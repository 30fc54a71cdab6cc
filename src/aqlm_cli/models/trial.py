"""Whether transformers will load a packed checkpoint: tried on the meta device, and with numbers where it is small.

The `aqlm` inference package puts a module of its own in the place of each linear layer that has codes. It has no
`weight`, and a family that looks for one while it loads or computes fails. The package need not be installed for a
trial: a stand-in has its parameters and no weight either, and transformers' own rule says which layers it replaces.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import count_parameters, replace_module
from aqlm_cli.models.gaps import why_unfit
from aqlm_cli.models.loading import first_line, load_config, load_network, quiet, without_weights
from aqlm_cli.models.names import CODED, placements
from aqlm_cli.models.positions import stated_length
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_cli.runs.files import TensorLayout
from aqlm_kernels import from_checkpoint

TRIAL = "aqlm-cli-trial"
"""The name under which transformers knows `Trial`."""

TOKENS = 40
"""Of the forward that is tried, at most: more than what our own kernels read by tables of 16 bits."""

SMALL = 32_000_000
"""Weights of a network that is loaded twice, in 32 bits, to see whether both compute the same."""

SAME = 1e-3
"""Relative difference of one token's logits; sums in another order make less than 1e-5 of it, and seldom choose another
expert."""

EXCEPTIONS = "linear_weights_not_to_quantize"


class NoWeightError(AttributeError):
    """Something looked for the weight of the layer at `path`, which has codes."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} has codes and no weight")
        self.path = path


def refusal(
    network: transformers.PreTrainedModel,
    layouts: Mapping[str, TensorLayout],
    quantization: Mapping[str, Any] | None,
    coded: Collection[str],
) -> str | None:
    """Why transformers could not load a checkpoint with these tensors, or compute with it; None where it can.

    `network` is without numbers, `quantization` what config.json will say of codes, and `coded` the paths of the layers
    that have some; None and no paths where none has.
    """
    for names in network.all_tied_weights_keys.items():
        if any(name.rpartition(".")[0] in coded for name in names):
            return f"{names[0]} and {names[1]} are one tensor, which codes cannot be"
    try:
        loaded, missing = _load(network, layouts, quantization)
        if missing:
            return f"transformers would find no tensor for {missing[0]} in it"
        _run(loaded)
    except NoWeightError:
        assert quantization is not None
        return _looking(network, layouts, quantization)
    except Exception as error:  # whatever a family makes of names and shapes that it does not expect
        return f"transformers {transformers.__version__} fails on it: {first_line(error)}"
    return None


def refuse_gaps(
    source: ModelSource, network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout]
) -> None:
    """ModelError where the model's files, which have tensors of these layouts, do not fill its network."""
    try:
        _, report = _report(network, layouts, None, ignore_mismatched_sizes=True)
    except Exception:  # tensors that cannot be cut or joined are named here, and the rest by `refusal`
        placements(network, layouts)
        return

    def name_in_files(key: str) -> str:
        placement = next(placement for placement in placements(network, layouts) if key in placement.parameters)
        first, *others = placement.stored
        return first if placement.convert is None else f"{key} (made of {first} and {len(others)} more)"

    fault = why_unfit(report, name_in_files)
    if fault is not None:
        raise ModelError(f"{source.name} {fault}")


def _looking(
    network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout], quantization: Mapping[str, Any]
) -> str:
    """Name the layers that have to keep their weights: one after another is spared until nothing looks for any."""
    spared: dict[str, str] = {}
    while True:
        patterns = [rf".*\.{name}$" for name in spared]
        try:
            loaded, _ = _load(network, layouts, {**quantization, EXCEPTIONS: [*quantization[EXCEPTIONS], *patterns]})
            _run(loaded)
        except NoWeightError as error:
            spared[error.path.rpartition(".")[2]] = error.path
            continue
        except Exception:  # spared layers have no weights here
            pass
        first, skips = next(iter(spared.values())), " ".join(rf"--skip '.*\.{name}'" for name in spared)
        family = network.config.model_type
        return (
            f"transformers looks for the weight of {first} in a network of the family {family}, and a layer with codes "
            f"has none ({skips} leaves such layers in 16 bits)"
        )


def _load(
    network: transformers.PreTrainedModel, layouts: Mapping[str, TensorLayout], quantization: Mapping[str, Any] | None
) -> tuple[transformers.PreTrainedModel, Sequence[str]]:
    """The network as transformers would load it, and what it would find no tensor for."""
    loaded, report = _report(network, layouts, quantization)
    return loaded, sorted(report["missing_keys"])


def _report(
    network: transformers.PreTrainedModel,
    layouts: Mapping[str, TensorLayout],
    quantization: Mapping[str, Any] | None,
    **options: Any,
) -> tuple[transformers.PreTrainedModel, Mapping[str, Any]]:
    """The network as transformers would load it, and its loading info."""
    config = copy.deepcopy(network.config)
    if quantization is not None:
        config.quantization_config = {**quantization, "quant_method": TRIAL}
    state = {name: torch.empty(layout.shape, dtype=layout.dtype, device="meta") for name, layout in layouts.items()}
    kind: Any = type(network)
    with quiet():
        loaded, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.bfloat16,  # in which products of grouped experts are known without numbers
            device_map={"": "meta"},
            output_loading_info=True,
            **options,
        )
    return loaded, report


@torch.no_grad()
def _run(loaded: transformers.PreTrainedModel) -> None:
    """Compute without numbers as far as that goes; only a look for a weight counts."""
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    # Most families look at the numbers to make a mask, and take one of four dimensions as it is.
    for masks in {}, {"attention_mask": torch.zeros((1, 1, TOKENS, TOKENS), dtype=torch.bool, device="meta")}:
        try:
            with quiet():
                loaded(input_ids=ids, use_cache=False, **masks)
        except NoWeightError:
            raise
        except Exception:  # what depends on numbers
            continue


def disagreement(packed: ModelSource) -> str | None:
    """How what transformers makes of a packed checkpoint differs from what we do; None where it does not.

    On the meta device, and for a small one also by the logits of some tokens.
    """
    said, stored = model_config(packed).get("quantization_config"), tensor_index(packed.directory)
    network = without_weights(load_config(packed), packed.trust_remote_code)
    reason = refusal(network, {name: tensor.layout for name, tensor in stored.items()}, said, ())
    if reason is not None or count_parameters(network) > SMALL:
        return reason
    words = max(1, network.config.get_text_config().vocab_size // 2)  # what stands for pictures and the like comes last
    stated = stated_length(model_config(packed))
    tokens = TOKENS if stated is None else min(TOKENS, stated[1])
    ids = torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        theirs, ours = _logits(_load_numbers(packed, said), ids), _logits(load_network(packed, torch.float32), ids)
    except Exception as error:  # as above
        return f"transformers {transformers.__version__} fails on it: {first_line(error)}"
    apart = (theirs - ours).norm(dim=-1) > SAME * ours.norm(dim=-1)  # [1, tokens]
    return "transformers computes something else with it than aqlm" if apart.float().mean() > 0.5 else None


def _load_numbers(packed: ModelSource, quantization: Mapping[str, Any] | None) -> nn.Module:
    config = load_config(packed)
    if quantization is not None:
        config.quantization_config = {**quantization, "quant_method": TRIAL}
    with quiet():
        loaded: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            packed.directory, config=config, dtype=torch.float32, trust_remote_code=packed.trust_remote_code
        )
    return loaded.eval()


@torch.no_grad()
def _logits(network: nn.Module, ids: Tensor) -> Tensor:
    with quiet():
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits.float()


class CodedLinear(nn.Module):
    """The stand-in for a layer of the inference package."""

    def __init__(self, path: str, linear: nn.Linear, settings: TrialSettings) -> None:
        super().__init__()
        self.path, self.in_features, self.out_features = path, linear.in_features, linear.out_features
        group, books, bits = settings.in_group_size, settings.num_codebooks, settings.nbits_per_codebook
        layouts = {
            "codes": TensorLayout(
                torch.int8 if bits <= 8 else torch.int16, (self.out_features, self.in_features // group, books)
            ),
            "codebooks": TensorLayout(torch.float16, (books, 2**bits, 1, group)),
            "scales": TensorLayout(torch.float16, (self.out_features, 1, 1, 1)),
        }
        for name, layout in layouts.items():
            empty = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise NoWeightError(self.path)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self.out_features))
        matrix = from_checkpoint({name: getattr(self, name) for name in CODED})
        return nn.functional.linear(x, matrix.dequantize().to(x.dtype), self.bias)


@register_quantization_config(TRIAL)
class TrialSettings(QuantizationConfigMixin):
    """What transformers makes of the description of the codes."""

    quant_method: Any

    def __init__(
        self,
        num_codebooks: int,
        nbits_per_codebook: int,
        in_group_size: int,
        linear_weights_not_to_quantize: list[str],
        **_: Any,
    ) -> None:
        self.quant_method = TRIAL
        self.num_codebooks = num_codebooks
        self.nbits_per_codebook = nbits_per_codebook
        self.in_group_size = in_group_size
        self.linear_weights_not_to_quantize = linear_weights_not_to_quantize


@register_quantizer(TRIAL)
class Trial(HfQuantizer):
    """transformers puts a stand-in wherever it would put a layer of the inference package."""

    quantization_config: TrialSettings

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        settings = self.quantization_config
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(path, settings.linear_weights_not_to_quantize):
                replace_module(model, path, CodedLinear(path, module, settings))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
