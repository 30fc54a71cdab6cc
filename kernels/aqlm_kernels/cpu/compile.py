"""`compiled`: Numba's decorator with the settings that every kernel here shares, and with types.

Numba ships no type hints, so that a kernel it decorates would lose its signature. Kernels import from here instead.

Same bits for any number of threads: `prange` runs over output tiles (or other blocks whose size does not depend on the
threads), one thread owns one of them, and the sums inside it run in an order that does not depend on who runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import numba
from numba.extending import intrinsic

Kernel = TypeVar("Kernel", bound=Callable[..., object])

prange: Callable[[int], Iterable[int]] = numba.prange


def compiled(parallel: bool = False, fastmath: Iterable[str] = ()) -> Callable[[Kernel], Kernel]:
    """Compile for this machine at the first call with new argument types; the code runs without the interpreter lock.

    `fastmath` names LLVM flags: "contract" allows fused multiply-add, "reassoc" another order of a sum. The machine
    code is cached on disk, so that a second run does not compile again. Numba notices an edit of the kernel's own file
    only: a kernel must call compiled functions of its own file, not of others.
    """

    def decorate(kernel: Kernel) -> Kernel:
        decorator = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=parallel, fastmath=set(fastmath))
        return cast(Kernel, decorator(kernel))

    return decorate


def instruction(describe: Callable[..., Any]) -> Callable[..., Any]:
    """A few instructions of LLVM that kernels call as a function.

    `describe(typing_context, *argument_types)` returns the signature and what generates the code; callers pass the
    arguments alone. (Numba's own hints say that they pass the context, too.)
    """
    return cast(Callable[..., Any], intrinsic(describe))
