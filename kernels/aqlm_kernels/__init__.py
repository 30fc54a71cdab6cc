"""Additive quantization: the compressed matrix, products with it, and the layer that trains and serves it.

    packed = PackedMatrix(AdditiveMatrix(codes=..., codebooks=..., scales=...))
    y = matmul(x, packed)

Knows torch, numpy, numba and, where there is a GPU, triton only. Errors that a caller can fix are KernelErrors.
"""

from aqlm_kernels.backends import BACKENDS, Backend, choose, matmul, smallest
from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.cpu.bandwidth import read_bandwidth
from aqlm_kernels.cpu.decoder import Decoder, DecoderBlock
from aqlm_kernels.cpu.head import why_not_head
from aqlm_kernels.cpu.lm_head import ByteRows, matmul_dense
from aqlm_kernels.cpu.stacks import DecoderLayer, HeadLayer, why_not_compiled
from aqlm_kernels.embedding import CompressedEmbedding, embedding_scale
from aqlm_kernels.errors import KernelError
from aqlm_kernels.experts import SingleExperts, expert_shapes, is_fused, why_not_single
from aqlm_kernels.hf_layout import from_checkpoint, to_checkpoint
from aqlm_kernels.import_hooks import import_after
from aqlm_kernels.linear import AdditiveLinear, coded_layers
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.balance import balanced, balancing_shift
from aqlm_kernels.matrices.bitpack import pack_bits, packed_bytes, unpack_bits
from aqlm_kernels.matrices.blockfloat import BlockFloatMatrix
from aqlm_kernels.matrices.kinds import MATRIX_KINDS, quantized_layers
from aqlm_kernels.matrices.level import LevelMatrix
from aqlm_kernels.matrices.matrix import Matrix, QuantizedLayer
from aqlm_kernels.matrices.refined import RefinedMatrix
from aqlm_kernels.matrices.uniform import UniformMatrix
from aqlm_kernels.native import NATIVE
from aqlm_kernels.packed import PackedMatrix
from aqlm_kernels.patch_transformers import patch_transformers
from aqlm_kernels.refined import RefinedLinear

__all__ = [
    "BACKENDS",
    "MATRIX_KINDS",
    "NATIVE",
    "AdditiveLinear",
    "AdditiveMatrix",
    "Backend",
    "BlockFloatMatrix",
    "ByteRows",
    "CompressedEmbedding",
    "CompressedLinear",
    "Decoder",
    "DecoderBlock",
    "DecoderLayer",
    "HeadLayer",
    "KernelError",
    "LevelMatrix",
    "Matrix",
    "PackedMatrix",
    "QuantizedLayer",
    "RefinedLinear",
    "RefinedMatrix",
    "SingleExperts",
    "UniformMatrix",
    "balanced",
    "balancing_shift",
    "choose",
    "coded_layers",
    "embedding_scale",
    "expert_shapes",
    "from_checkpoint",
    "is_fused",
    "matmul",
    "matmul_dense",
    "pack_bits",
    "packed_bytes",
    "patch_transformers",
    "quantized_layers",
    "read_bandwidth",
    "smallest",
    "to_checkpoint",
    "unpack_bits",
    "why_not_compiled",
    "why_not_head",
    "why_not_single",
]

import_after("transformers.quantizers.auto", "aqlm_kernels.hf_quantizer")
import_after("peft.tuners.lora.model", "aqlm_kernels.peft_layers")
