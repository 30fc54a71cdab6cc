"""Additive quantization of language models, from the command line (`aqlm`) and from Python.

    import aqlm_cli

    run = aqlm_cli.quantize("smollm2-135m", bits=2, data="builtin:80")  # as `aqlm quantize` does
    print(run.evaluate())                                               # perplexity beside the base model's
    model, tokenizer = aqlm_cli.load(run.path)

The functions are loaded when they are first used: this import loads neither torch nor transformers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from aqlm_cli.errors import AqlmError
from aqlm_cli.openmp import share_pool

if TYPE_CHECKING:
    from aqlm_cli.pipeline.door import Run, load, open_run, quantize

__all__ = ["AqlmError", "Run", "load", "open_run", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "torch" not in sys.modules:
        share_pool()
    from aqlm_cli.pipeline import door

    return getattr(door, name)


def __dir__() -> list[str]:
    return __all__
