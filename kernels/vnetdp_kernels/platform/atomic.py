"""Loads and stores on shared memory, with their order in the name: the one file that knows LLVM.

Each function has two bodies under one name. The Python body serves NUMBA_DISABLE_JIT=1, mypy and a debugger; compiled
kernels get the LLVM one. Values are int64 in both: loads extend with zeros, stores mask (a u64 of 2**63 and more
therefore reads as negative). *offset* is in bytes for a uint8 array, and an index for an int64 array. Offsets of
the u16, u32 and u64 forms must be aligned to their size, except where the name says `unaligned`.

In plain Python an interpreter runs one thread at a time, but memory is shared with other processes too, and with compiled
threads. So a load or store of up to 8 bytes is one access there as well, and the two that read and then write take a lock
that holds against other processes in plain Python.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

_RELAXED = "monotonic"
_LOCK = threading.Lock()
_LOCK_FILE = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC) if config.DISABLE_JIT else -1


class _Alone:
    """Of all threads, and of all processes that run this file in plain Python, one is inside."""

    def __enter__(self) -> None:
        _LOCK.acquire()
        try:
            if _LOCK_FILE >= 0:
                fcntl.flock(_LOCK_FILE, fcntl.LOCK_EX)
        except BaseException:  # ^C while another process is inside: no thread of ours may wait for ever after that
            _LOCK.release()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            if _LOCK_FILE >= 0:
                fcntl.flock(_LOCK_FILE, fcntl.LOCK_UN)
        finally:
            _LOCK.release()


_ALONE = _Alone()


def compiled_as(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Register the compiled kernels' body in place of *function*. Annotations are for mypy: Numba compares them."""

    def register(choose: Callable[..., Any]) -> None:
        choose.__annotations__ = {}

        @functools.wraps(choose)
        def stripped(*args: Any, **kwargs: Any) -> Any:
            body = choose(*args, **kwargs)
            body.__annotations__ = {}
            return body

        overload(function)(stripped)

    return register


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, bits: int) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    if array_type.dtype == types.uint8:
        data = builder.bitcast(data, ir.IntType(8).as_pointer())
    element = builder.gep(data, [offset])
    return builder.bitcast(element, ir.IntType(bits).as_pointer())


def _load(bits: int, order: str, align: int) -> Callable[[Any, int], int]:
    code = {8: "<B", 16: "<H", 32: "<I", 64: "<q"}[bits]
    size = bits // 8

    def load(array: Any, offset: int) -> int:
        if array.itemsize == 8:
            return int(array[offset])
        if offset < 0:
            raise IndexError(offset)
        return int(struct.unpack_from(code, array.data, offset)[0])

    @intrinsic  # type: ignore[untyped-decorator]
    def load_llvm(typing_context: Any, array: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], bits)
            if order:
                value = builder.load_atomic(pointer, order, align)
            else:
                value = builder.load(pointer, align=align)
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.int64(array, types.int64), codegen

    @compiled_as(load)
    def load_overload(array: Any, offset: Any) -> Any:
        items = size if array.dtype == types.uint8 else 1
        if config.BOUNDSCHECK:

            def checked(array: Any, offset: int) -> int:
                if offset < 0 or offset + items > array.size:
                    raise IndexError("load outside the array")
                return load_llvm(array, offset)

            return checked
        return lambda array, offset: load_llvm(array, offset)

    return load


def _store(bits: int, order: str, align: int) -> Callable[[Any, int, int], None]:
    size = bits // 8
    c_type: Any = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_int64}[bits]

    def store(array: Any, offset: int, value: int) -> None:
        if array.itemsize == 8:
            array[offset] = value
            return
        if not 0 <= offset <= array.size - size:
            raise IndexError(offset)
        # Not struct.pack_into, which writes zeros first: another user of the memory would read them.
        c_type.from_buffer(array, offset).value = value

    @intrinsic  # type: ignore[untyped-decorator]
    def store_llvm(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], bits)
            value = builder.trunc(args[2], ir.IntType(bits)) if bits < 64 else args[2]
            if order:
                builder.store_atomic(value, pointer, order, align)
            else:
                builder.store(value, pointer, align=align)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.int64), codegen

    @compiled_as(store)
    def store_overload(array: Any, offset: Any, value: Any) -> Any:
        items = size if array.dtype == types.uint8 else 1
        if config.BOUNDSCHECK:

            def checked(array: Any, offset: int, value: int) -> None:
                if offset < 0 or offset + items > array.size:
                    raise IndexError("store outside the array")
                store_llvm(array, offset, value)

            return checked
        return lambda array, offset, value: store_llvm(array, offset, value)

    return store


load_u8 = _load(8, _RELAXED, 1)
load_u16 = _load(16, _RELAXED, 2)
load_u32 = _load(32, _RELAXED, 4)
load_u64 = _load(64, _RELAXED, 8)
load_u16_acquire = _load(16, "acquire", 2)
load_i64_acquire = _load(64, "acquire", 8)
store_u8 = _store(8, _RELAXED, 1)
store_u16 = _store(16, _RELAXED, 2)
store_u32 = _store(32, _RELAXED, 4)
store_u64 = _store(64, _RELAXED, 8)
store_u16_release = _store(16, "release", 2)
store_i64_release = _store(64, "release", 8)

# Not atomic: for private memory, and for buffers, where a torn value is the guest's own loss.
load_u16_unaligned = _load(16, "", 1)
load_u32_unaligned = _load(32, "", 1)
load_u64_unaligned = _load(64, "", 1)
store_u16_unaligned = _store(16, "", 1)
store_u32_unaligned = _store(32, "", 1)
store_u64_unaligned = _store(64, "", 1)


@intrinsic  # type: ignore[untyped-decorator]
def _fence_llvm(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def fence() -> None:
    """Order all accesses before it with all after it, stores before loads too (a full barrier)."""
    with _LOCK:
        pass  # the barrier is the lock's: the other side may be a process, which does not wait for this interpreter


@compiled_as(fence)
def _fence_overload() -> Any:
    return lambda: _fence_llvm()


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_or_llvm(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], 8)
        value = builder.trunc(args[2], ir.IntType(8))
        before = builder.atomic_rmw("or", pointer, value, "seq_cst")
        return builder.zext(before, ir.IntType(64))

    return types.int64(array, types.int64, types.int64), codegen


def fetch_or_u8(array: Bytes, offset: int, value: int) -> int:
    """Set bits of one byte atomically (a full barrier); return the byte as it was."""
    with _ALONE:
        before = int(array[offset])
        array[offset] = before | value
    return before


@compiled_as(fetch_or_u8)
def _fetch_or_overload(array: Any, offset: Any, value: Any) -> Any:
    return lambda array, offset, value: _fetch_or_llvm(array, offset, value)


@intrinsic  # type: ignore[untyped-decorator]
def _exchange_llvm(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], 64)
        return builder.atomic_rmw("xchg", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


def exchange_u64(array: Bytes, offset: int, value: int) -> int:
    """Swap 8 aligned bytes atomically (a full barrier); return them as they were."""
    with _ALONE:
        before = int(load_u64(array, offset))
        store_u64(array, offset, value)
    return before


@compiled_as(exchange_u64)
def _exchange_overload(array: Any, offset: Any, value: Any) -> Any:
    return lambda array, offset, value: _exchange_llvm(array, offset, value)


@intrinsic  # type: ignore[untyped-decorator]
def _copy_llvm(typing_context: Any, dst: Any, dst_offset: Any, src: Any, src_offset: Any, length: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = _pointer(context, builder, signature.args[0], args[0], args[1], 8)
        source = _pointer(context, builder, signature.args[2], args[2], args[3], 8)
        cgutils.raw_memcpy(builder, to, source, args[4], 1)
        return context.get_dummy_value()

    return types.void(dst, types.int64, src, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _copy_64_llvm(typing_context: Any, dst: Any, dst_offset: Any, src: Any, src_offset: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = ir.VectorType(ir.IntType(64), 4).as_pointer()
        to = builder.bitcast(_pointer(context, builder, signature.args[0], args[0], args[1], 8), half)
        source = builder.bitcast(_pointer(context, builder, signature.args[2], args[2], args[3], 8), half)
        second = [ir.IntType(64)(1)]
        low = builder.load(source, align=1)
        high = builder.load(builder.gep(source, second), align=1)
        builder.store(low, to, align=1)
        builder.store(high, builder.gep(to, second), align=1)
        return context.get_dummy_value()

    return types.void(dst, types.int64, src, types.int64), codegen


def copy(dst: Bytes, dst_offset: int, src: Bytes, src_offset: int, length: int) -> None:
    """Copy *length* bytes; the ranges may not overlap."""
    if length:
        # Plain slices, not memmove, would also do; this keeps hostile lengths an exception in Python mode.
        dst[dst_offset : dst_offset + length] = src[src_offset : src_offset + length]


@compiled_as(copy)
def _copy_overload(dst: Any, dst_offset: Any, src: Any, src_offset: Any, length: Any) -> Any:
    if config.BOUNDSCHECK:

        def checked(dst: Any, dst_offset: int, src: Any, src_offset: int, length: int) -> None:
            if length < 0 or dst_offset < 0 or src_offset < 0:
                raise IndexError("copy with a negative offset or length")
            if dst_offset + length > dst.size or src_offset + length > src.size:
                raise IndexError("copy outside the array")
            _copy_llvm(dst, dst_offset, src, src_offset, length)

        return checked

    # A call of memcpy costs as much as some lines, and the C library's takes a sixth longer for 1,500 bytes in step.
    def by_64(dst: Any, dst_offset: int, src: Any, src_offset: int, length: int) -> None:
        if length < 64:
            _copy_llvm(dst, dst_offset, src, src_offset, length)
            return
        last = length - 64
        done = 0
        while done < last:
            _copy_64_llvm(dst, dst_offset + done, src, src_offset + done)
            done += 64
        _copy_64_llvm(dst, dst_offset + last, src, src_offset + last)

    return by_64


@intrinsic  # type: ignore[untyped-decorator]
def _address_llvm(typing_context: Any, array: Any, offset: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], 8)
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(array, types.int64), codegen


def address(array: Any, offset: int) -> int:
    """The machine address of an element, for system calls in io.py."""
    return int(array.ctypes.data + offset * array.itemsize)


@compiled_as(address)
def _address_overload(array: Any, offset: Any) -> Any:
    return lambda array, offset: _address_llvm(array, offset)


@intrinsic  # type: ignore[untyped-decorator]
def _peek_llvm(typing_context: Any, at: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load(pointer), ir.IntType(64))

    return types.int64(types.uintp), codegen


def peek_i32(at: int) -> int:
    """The C int at a machine address (compiled code only: io.py reads errno with it)."""
    raise NotImplementedError


@compiled_as(peek_i32)
def _peek_overload(at: Any) -> Any:
    return lambda at: _peek_llvm(at)


@intrinsic  # type: ignore[untyped-decorator]
def peek_i64(typing_context: Any, at: Any) -> Any:
    """The word at a machine address (compiled code only: the SIGBUS handler's table)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.uintp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def poke_i64(typing_context: Any, at: Any, value: Any) -> Any:
    """Set the word at a machine address (compiled code only)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uintp, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch_to_write_llvm(typing_context: Any, array: Any, offset: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], 8)
        word = ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0")
        to_write, keep_near, data = word(1), word(3), word(1)
        builder.call(function, [pointer, to_write, keep_near, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


def prefetch_to_write(array: Bytes, offset: int) -> None:
    """Have the cache fetch the line of a byte that will be written soon. A hint, which faults nowhere."""


@compiled_as(prefetch_to_write)
def _prefetch_to_write_overload(array: Any, offset: Any) -> Any:
    return lambda array, offset: _prefetch_to_write_llvm(array, offset)
