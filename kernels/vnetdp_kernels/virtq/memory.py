"""Guest addresses: the checked translation into the window, the one write helper, and the dirty log.

The window is one uint8 array that holds every region of guest memory, holes included. The region table has a row for
each *run* of adjacent regions, so a range that crosses from one region into the next is still one range.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    copy,
    exchange_u64,
    fence,
    fetch_or_u8,
    load_u8,
    load_u16_unaligned,
    load_u64_unaligned,
    prefetch_to_write,
    store_u16_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel

_AHEAD = 2048


@inlined
def translate(regions: Words, gpa: int, length: int) -> int:
    """Return the window offset of the *length* bytes at guest address *gpa*, or E_ADDRESS.

    regions int64[n, 3] (guest address, length, window offset). A u64 address of 2**63 and more is negative here, and
    in no region. No sum that could wrap is formed from numbers that the guest wrote.
    """
    if gpa < 0 or length < 0:
        return r.E_ADDRESS
    for i in range(regions.shape[0]):
        into = gpa - regions[i, r.REGION_GPA]
        if 0 <= into <= regions[i, r.REGION_LEN] - length:
            return int(regions[i, r.REGION_OFFSET]) + into
    return r.E_ADDRESS


@inlined
def prefetch_write(mem: Bytes, offset: int, length: int) -> None:
    """Have the cache fetch *length* bytes, which are written soon: stores wait for their lines one after another.

    A hint, for guest memory; more than 2 KiB would push out lines that are needed before.
    """
    end = offset + min(length, _AHEAD)
    while offset < end:
        prefetch_to_write(mem, offset)
        offset += spec.CACHE_LINE


@inlined
def _mark(log: Bytes, gpa: int, length: int, set_too: bool) -> None:
    """Set the bit of each page that [gpa, gpa + length) touches; *set_too*: also where it is set already."""
    if length <= 0:
        return
    page = gpa >> spec.PAGE_SHIFT
    last = (gpa + length - 1) >> spec.PAGE_SHIFT
    while page <= last:
        at = page >> 3
        if 0 <= at < log.size and (set_too or not load_u8(log, at) >> (page & 7) & 1):
            fetch_or_u8(log, at, 1 << (page & 7))
        page += 1


@inlined
def mark_dirty(log: Bytes, gpa: int, length: int) -> None:
    """Set the bit of each page that [gpa, gpa + length) touches; bits outside the log are left out.

    log uint8[n], bit p % 8 of byte p // 8 for page p. Comes after the write it speaks of: the atomic OR is a full
    barrier, and pairs with the exchange in `take_dirty`. So it is done always: a look first ("is it set already?") could
    pass the data still in the store buffer.
    """
    _mark(log, gpa, length, True)


@inlined
def mark_behind_fence(log: Bytes, gpa: int, length: int) -> None:
    """`mark_dirty` for writes with a `fence` behind them: then a bit that is set already can stay as it is.

    A source that takes the bit later reads the page later, and the writes were there before this looked.
    """
    _mark(log, gpa, length, False)


@inlined
def mark_noted(vq: Words, log: Bytes) -> None:
    """Set the deferred dirty mark of `write`. Must run before the buffer is published as used."""
    if vq[r.VQ_NOTED]:
        mark_dirty(log, (vq[r.VQ_NOTED] - 1) << spec.PAGE_SHIFT, 1)
        vq[r.VQ_NOTED] = 0


@inlined
def note(vq: Words, log: Bytes, gpa: int, length: int) -> None:
    """Have the pages of a write marked, but the last one later: the next write is often to the same.

    Each mark is a full barrier, for which all stores before it have to arrive, those to lines of the driver's core too.
    """
    if length <= 0:
        return
    page = (gpa >> spec.PAGE_SHIFT) + 1
    last = ((gpa + length - 1) >> spec.PAGE_SHIFT) + 1
    while page <= last:
        if page != vq[r.VQ_NOTED]:
            mark_noted(vq, log)
            vq[r.VQ_NOTED] = page
        page += 1


@inlined
def write(mem: Bytes, vq: Words, log: Bytes, offset: int, gpa: int, src: Bytes, src_offset: int, length: int) -> None:
    """Copy *length* bytes into guest memory for queue *vq*, and log it, at the latest with the next `mark_noted`.

    Every write to a guest's buffer comes through here, or calls `note` behind it.
    """
    copy(mem, offset, src, src_offset, length)
    if log.size > 0:
        note(vq, log, gpa, length)


@inlined
def write_header(mem: Bytes, offset: int, src: Bytes, src_offset: int, num_buffers: int) -> None:
    """Write a virtio_net_hdr of 12 bytes, which is not worth a call of memcpy; to `note` it is the caller's, with its frame.

    num_buffers goes straight to the guest: read back from *src* right after it was stored there, it would stall.
    """
    store_u64_unaligned(mem, offset, load_u64_unaligned(src, src_offset))
    store_u16_unaligned(mem, offset + 8, load_u16_unaligned(src, src_offset + 8))
    store_u16_unaligned(mem, offset + 10, num_buffers)


@kernel
def take_dirty(log: Bytes, start: int, pages: Words) -> tuple[int, int]:
    """Move the numbers of dirty pages out of the log, from byte *start* on (a multiple of 8), until *pages* is full.

    pages int64[n], n at least 64. Returns (pages found, byte to go on from; the log's size when it is through).
    Words are swapped with zero atomically (pairs with the OR in `_mark`): a page dirtied again is found again.
    """
    found = 0
    at = start
    while at + 8 <= log.size and found + 64 <= pages.size:
        word = exchange_u64(log, at, 0)
        bit = 0
        while word != 0 and bit < 64:
            if (word >> bit) & 1:
                pages[found] = (at << 3) + bit
                found += 1
            bit += 1
        at += 8
    # Pairs with the fence in publish_used: not every processor's exchange keeps the reads of pages, which come next, behind
    # its own write.
    fence()
    return found, at
