"""The largest tensor that some work makes: torch's memory without the noise of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Largest(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        results = function(*arguments, **(options or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
        for made in tree_leaves(results):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in inputs:  # no view of them
                self.found = max(self.found, made.nbytes)
        return results


def largest_tensor(work: Callable[[], object]) -> int:
    """Bytes of the largest tensor that `work` makes, in its backward, too."""
    with torch.autograd.set_multithreading_enabled(False), _Largest() as largest:
        work()
    return largest.found
