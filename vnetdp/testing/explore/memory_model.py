"""The order in which the stores of an actor reach memory: x86-TSO, or a weaker one in the manner of aarch64.

**tso**: a first-in, first-out store buffer for each actor. A load finds the actor's own stores first. A fence and an atomic
read-modify-write wait until the buffer is empty.

**weak**: a store may overtake earlier ones to other addresses, but a release store overtakes none. A load may return an
older value, back to the actor's last acquire, fence or atomic operation; never one older than it has read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .operations import Store

MODELS = ("tso", "weak")


class Held(NamedTuple):
    """A store in the store buffer. bound: a later one reached memory already, so this one was executed too."""

    store: Store
    bound: bool


class Old(NamedTuple):
    """Bytes that were in memory until another actor's store replaced them."""

    at: int
    data: bytes


Buffer = tuple[Held, ...]
Past = tuple[Old, ...]


def meet(change: Store | Old, at: int, length: int) -> bool:
    """Return whether a change of memory touches *length* bytes at *at*."""
    return change.at < at + length and at < change.at + len(change.data)


def overlaid(data: bytes, at: int, changes: list[tuple[int, bytes]]) -> bytes:
    """Return *data*, the bytes from *at* on, with *changes* (offset, bytes) made to it."""
    result = bytearray(data)
    for start, new in changes:
        first, last = max(at, start), min(at + len(data), start + len(new))
        if first < last:
            result[first - at : last - at] = new[first - start : last - start]
    return bytes(result)


def before(buffer: Buffer, index: int, model: str) -> list[int]:
    """Return the indices of the stores that have to reach memory for the one at *index* to do so, in order, itself last."""
    store = buffer[index].store
    if model == "tso" or store.release:
        return list(range(index + 1))
    needed = {index}
    for k in range(index):
        if meet(buffer[k].store, store.at, len(store.data)):
            needed.update(before(buffer, k, model))
    return sorted(needed)


def without(buffer: Buffer, gone: list[int]) -> Buffer:
    """Return the buffer once the stores at the indices *gone* have reached memory."""
    return tuple(Held(store, bound or k < gone[-1]) for k, (store, bound) in enumerate(buffer) if k not in gone)


def values(image: bytes, buffer: Buffer, past: Past, at: int, length: int) -> Iterator[tuple[bytes, int]]:
    """Return each value that a load may see, the newest first, and how much of *past* lies before it."""
    now = image[at : at + length]
    seen = set()
    held = [(store.at, store.data) for store, _ in buffer if meet(store, at, length)]
    for k in range(len(past), -1, -1):
        if k < len(past):
            old = past[k]
            if not meet(old, at, length):
                continue
            now = overlaid(now, at, [(old.at, old.data)])
        value = overlaid(now, at, held) if held else now
        if value not in seen:
            seen.add(value)
            yield value, k


def past_after(past: Past, before: int, at: int, length: int, acquire: bool) -> Past:
    """Return what may still be read of *past* after a load that saw the value that *before* entries lie before."""
    if acquire:
        return past[before:]
    return tuple(old for k, old in enumerate(past) if k >= before or not meet(old, at, length))
