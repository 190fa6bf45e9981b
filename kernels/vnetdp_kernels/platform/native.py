"""Arrays and compiled kernels at their machine addresses, which stand for all that a loop works on.

Python takes 10 µs to hand thirty arrays to compiled code, and nothing to hand it an address. A kernel that is called at its
address is not linked into its caller, and so compiled once. In plain Python the kernel itself is called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from .atomic import Bytes, Words


def _array_llvm(context: Any, builder: Any, array: Any, at: Any, shape: Any) -> Any:
    """Return the contiguous array of a type, an address and its dimensions."""
    made = context.make_array(array)(context, builder)
    itemsize = context.get_constant(types.intp, array.dtype.bitwidth // 8)
    strides = [itemsize]
    for dimension in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], dimension))
    data = builder.inttoptr(at, context.get_data_type(array.dtype).as_pointer())
    populate_array(made, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return made._getvalue()


# No function that may not allocate may return an array of its own making, a lambda of `compiled_as` neither.
def _view_llvm(dtype: Any, dimensions: int) -> Any:
    """Return an intrinsic of (row, view), as `words_of`."""
    array = types.Array(dtype, dimensions, "C")

    def view_of(typing_context: Any, row: Any, view: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            slots = [builder.add(args[1], context.get_constant(types.int64, n)) for n in range(1 + dimensions)]
            at, *shape = (builder.load(builder.gep(data, [slot])) for slot in slots)
            return _array_llvm(context, builder, array, at, shape)

        return array(row, types.int64), codegen

    return intrinsic(view_of)


@intrinsic  # type: ignore[untyped-decorator]
def _row_at_llvm(typing_context: Any, at: Any, slots: Any) -> Any:
    array = types.Array(types.int64, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array_llvm(context, builder, array, args[0], args[1:])

    return array(types.int64, types.int64), codegen


def _row_at(at: int, slots: int) -> Words:
    return np.ndarray(slots, np.int64, memoryview((ctypes.c_int64 * slots).from_address(int(at))))


def _words_of(row: Words, view: int) -> Words:
    at, rows, columns = row[view : view + 3].tolist()
    return _row_at(at, rows * columns).reshape(rows, columns)


def _bytes_of(row: Words, view: int) -> Bytes:
    at, rows, columns = row[view : view + 3].tolist()
    return np.ndarray((rows, columns), np.uint8, memoryview((ctypes.c_uint8 * (rows * columns)).from_address(at)))


def _tables_of(row: Words, view: int) -> Words:
    at, tables, rows, columns = row[view : view + 4].tolist()
    return _row_at(at, tables * rows * columns).reshape(tables, rows, columns)


row_at: Callable[[int, int], Words] = _row_at if config.DISABLE_JIT else _row_at_llvm
"""Return int64[slots] at an address. The caller keeps it mapped, as all arrays that these return."""
words_of: Callable[[Words, int], Words] = _words_of if config.DISABLE_JIT else _view_llvm(types.int64, 2)
"""Return the int64 array of two dimensions whose address and dimensions a row has from *view* on."""
bytes_of: Callable[[Words, int], Bytes] = _bytes_of if config.DISABLE_JIT else _view_llvm(types.uint8, 2)
"""Return the uint8 array of two dimensions whose address and dimensions a row has from *view* on."""
tables_of: Callable[[Words, int], Words] = _tables_of if config.DISABLE_JIT else _view_llvm(types.int64, 3)
"""Return the int64 array of three dimensions whose address and dimensions a row has from *view* on."""


def kernel_at(loop: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Return the address of a kernel that takes arguments like *args*, compiled or loaded if need be; 0 in plain Python."""
    if config.DISABLE_JIT:
        return 0
    kernel: Any = loop
    signature = tuple(kernel.typeof_pyval(arg) for arg in args)
    kernel.compile(signature)
    result = kernel.overloads[signature]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


@intrinsic  # type: ignore[untyped-decorator]
def call_at(typing_context: Any, at: Any, rings: Any, wire: Any, control: Any, scratch: Any, limits: Any) -> Any:
    """Call the loop at an address with its five bundles, in compiled code; return (LOOP_*, frames moved)."""
    result = types.UniTuple(types.int64, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bundles = signature.args[1:]
        function = context.call_conv.get_function_type(result, bundles)
        pointer = builder.inttoptr(args[0], function.as_pointer())
        status, value = context.call_conv.call_function(builder, pointer, result, bundles, args[1:])
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return value

    return result(types.int64, rings, wire, control, scratch, limits), codegen
