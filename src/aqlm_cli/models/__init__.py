"""Models, loaded with transformers. No other package imports it.

`resolve` turns the name that the user typed into a local Hugging Face directory; everything else reads that directory.
`load_network` returns an ordinary `nn.Module`, frozen and in evaluation mode, of a base model or of a packed one.
"""

from aqlm_cli.models.aqlm_checkpoint import plan_of_checkpoint
from aqlm_cli.models.attention import attend_blockwise
from aqlm_cli.models.backbone import Halves, halves_of
from aqlm_cli.models.decoding import Decoding, decoding_of, open_decoding
from aqlm_cli.models.loading import (
    BlockLoader,
    Network,
    load_config,
    load_network,
    load_outside,
    load_skeleton,
    load_tokenizer,
    load_without,
    saved_layouts,
)
from aqlm_cli.models.names import Placement, names_of_codes, placements, stored_parameters
from aqlm_cli.models.positions import refuse_longer_than_stated, refuse_too_long
from aqlm_cli.models.quantization import is_quantized
from aqlm_cli.models.resolve import (
    ResolvedModel,
    Subject,
    base_model_of,
    find_subject,
    refuse_other_model,
    resolve,
)
from aqlm_cli.models.sampling import open_sampling
from aqlm_cli.models.source import ModelSource, end_tokens, model_config, save_support_files, tensor_index
from aqlm_cli.models.tokenizer import open_tokenizer, refuse_unknown_tokens
from aqlm_cli.models.tying import untie_stored

__all__ = [
    "BlockLoader",
    "Decoding",
    "Halves",
    "ModelSource",
    "Network",
    "Placement",
    "ResolvedModel",
    "Subject",
    "attend_blockwise",
    "base_model_of",
    "decoding_of",
    "end_tokens",
    "find_subject",
    "halves_of",
    "is_quantized",
    "load_config",
    "load_network",
    "load_outside",
    "load_skeleton",
    "load_tokenizer",
    "load_without",
    "model_config",
    "names_of_codes",
    "open_decoding",
    "open_sampling",
    "open_tokenizer",
    "placements",
    "plan_of_checkpoint",
    "refuse_longer_than_stated",
    "refuse_other_model",
    "refuse_too_long",
    "refuse_unknown_tokens",
    "resolve",
    "save_support_files",
    "saved_layouts",
    "stored_parameters",
    "tensor_index",
    "untie_stored",
]
