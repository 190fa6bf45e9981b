"""Bundles: the arrays that kernels work on, by role. Each is one argument, which Numba passes as a struct.

The classes lie in a module that can be imported, and never in `__main__`: Numba's key of a compiled kernel names the class
of a bundle, so a class of `__main__` would miss the cache in every process. No Numba here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .atomic import Bytes, Words


class Guest(NamedTuple):
    """Guest memory, as the device sees it."""

    mem: Bytes  # uint8[n]: the window
    regions: Words  # int64[k, REGION_SLOTS]: guest addresses to window offsets
    log: Bytes  # uint8[n]: the dirty log; empty = writes are not logged


class Rings(NamedTuple):
    """All virtqueues of a device, the device's side: receiveq 2i, transmitq 2i + 1."""

    guest: Guest
    vqs: Words  # int64[2 * pairs, VQ_SLOTS]
    notify: Words  # int64[2 * pairs, 2]: kick and call descriptors; -1 = none


class DriverRings(NamedTuple):
    """All virtqueues of a device, the driver's side."""

    mem: Bytes  # uint8[n]: the window
    dvqs: Words  # int64[2 * pairs, DVQ_SLOTS]
    states: Words  # int64[2 * pairs, num, DESC_STATE_SLOTS]
    notify: Words  # int64[2 * pairs, 2]: kick and call descriptors; -1 = none


class Wire(NamedTuple):
    """An endpoint: a row of each array for a queue pair, except for the ledger."""

    eps: Words  # int64[pairs, EP_SLOTS]
    fds: Words  # int64[pairs]; -1 = none
    held: Bytes  # uint8[pairs, FRAME_SLOT]: the frame from the wire that found no receive buffer yet
    in_frames: Bytes  # uint8[pairs, slots * slot_len]: frames from an endpoint in Python
    in_lengths: Words  # int64[pairs, slots]
    out_frames: Bytes  # uint8[pairs, slots * slot_len]: frames for an endpoint in Python
    out_lengths: Words  # int64[pairs, slots]
    ledger: Words  # int64[flows, LEDGER_SLOTS]
    windows: Bytes  # uint8[flows, LEDGER_WINDOW]


class Port(NamedTuple):
    """One queue pair of an endpoint: its rows of a `Wire`."""

    ep: Words
    fd: int
    held: Bytes
    in_frames: Bytes
    in_lengths: Words
    out_frames: Bytes
    out_lengths: Words
    ledger: Words
    windows: Bytes


class Frame(NamedTuple):
    """A frame where it lies: rows [row, n_rows) of *iov* name its pieces in *mem*, *length* bytes together."""

    mem: Bytes
    iov: Words  # int64[n, IOV_SLOTS]
    row: int
    n_rows: int
    length: int


class Scratch(NamedTuple):
    """Arrays that a loop writes and nobody reads after it. Never shared between threads."""

    iov: Words  # int64[2 * cap, IOV_SLOTS]: the buffers of chains
    frame_iov: Words  # int64[cap, IOV_SLOTS]: the pieces of a frame
    chains: Words  # int64[n, 2]: head and bytes of each chain that a frame takes
    hdr: Bytes  # uint8[HDR_SCRATCH]: a virtio_net_hdr
    words: Words  # int64[SCRATCH_WORDS]: struct iovecs, and a clock's answer
    pollfds: Words  # int64[2, n]: struct pollfds, and what each stands for
    one: Words  # as `peer.tell_words`


class Control(NamedTuple):
    """How a loop is called away."""

    words: Words  # int64[CTL_SLOTS]
    fd: int  # readable when the doorbell rang; -1 = none


class Limits(NamedTuple):
    """When a loop returns of itself."""

    budget: int  # frames; -1 = no end
    poll_us: int  # busy-poll as long before sleeping; -1 = for ever
    timeout_ms: int  # 0 = do not wait; -1 = wait until the doorbell rings
