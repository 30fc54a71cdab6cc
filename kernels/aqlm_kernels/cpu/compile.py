"""`compiled`: Numba's decorator with the settings that all kernels here share, and with types.

Numba ships no type hints, so that a kernel it decorates would lose its signature. Kernels import from here instead.

Same bits for any number of threads: `prange` runs over output tiles (or other blocks whose size does not depend on the
threads), one thread owns one of them, and the order of the sums inside it does not depend on the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.extending import intrinsic

Kernel = TypeVar("Kernel", bound=Callable[..., object])

prange: Callable[[int], Iterable[int]] = numba.prange

array_at: Callable[..., Any] = numba.carray  # type: ignore[attr-defined]
"""The array of this shape at a pointer, in a kernel."""

_STAMP = sorted(
    (path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in Path(__file__).parent.glob("*.py")
)


def compiled(parallel: bool = False, fastmath: Iterable[str] = ()) -> Callable[[Kernel], Kernel]:
    """Compile for this machine at the first call with new argument types; the code runs without the interpreter lock.

    `fastmath` names LLVM flags: "contract" allows fused multiply-add, "reassoc" another order of a sum. The machine
    code is cached on disk, so that a second run does not compile again.
    """

    def decorate(kernel: Kernel) -> Kernel:
        decorator = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=parallel, fastmath=set(fastmath))
        dispatcher: Any = decorator(kernel)
        # Numba checks only the kernel's own file for changes to outdate cached code; kernels call one another.
        dispatcher._cache._cache_file._source_stamp = _STAMP
        return cast(Kernel, dispatcher)

    return decorate


def instruction(describe: Callable[..., Any]) -> Callable[..., Any]:
    """A few instructions of LLVM that kernels call as a function.

    `describe(typing_context, *argument_types)` returns the signature and the code generator; callers pass the
    arguments alone. (In Numba's own hints they pass the context, too.)
    """
    return cast(Callable[..., Any], intrinsic(describe))


def arrays(context: Any, builder: Any, signature: Any, arguments: Any, *places: int) -> list[Any]:
    """Arguments of an instruction that are arrays, in the form that `at` takes."""
    return [context.make_array(signature.args[place])(context, builder, arguments[place]) for place in places]


def at(builder: Any, array: Any, *indices: Any) -> Any:
    """Pointer to array[indices]; the array is contiguous along its last axis."""
    offset: Any = ir.Constant(ir.IntType(64), 0)
    for axis, index in enumerate(indices):
        offset = builder.add(offset, builder.mul(index, builder.extract_value(array.strides, axis)))
    return builder.gep(builder.bitcast(array.data, ir.IntType(8).as_pointer()), [offset])


def load(builder: Any, start: Any, kind: Any, offset: int) -> Any:
    place = builder.bitcast(builder.gep(start, [ir.Constant(ir.IntType(64), offset)]), kind.as_pointer())
    value = builder.load(place)
    value.align = 1
    return value


def store(builder: Any, value: Any, start: Any, offset: int) -> None:
    place = builder.bitcast(builder.gep(start, [ir.Constant(ir.IntType(64), offset)]), value.type.as_pointer())
    builder.store(value, place).align = 1


def splat(builder: Any, number: Any, lanes: int) -> Any:
    """A vector with the number in every lane."""
    kind = ir.VectorType(number.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
