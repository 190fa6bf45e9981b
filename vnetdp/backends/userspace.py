"""UserspaceBackend: the vhost verbs, applied to a Datapath in the caller's thread.

It is what QEMU's own virtio-net is when the device's loop runs it, and the inside of every vhost worker.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.virtq.bind import bind

from .. import features as f
from ..datapath import Datapath
from ..endpoints.base import Endpoint
from ..errors import BackendError, ConfigError, EndpointError
from ..memory import ADDRESS_LIMIT, DirtyLog, GuestMemory, Words
from ..notify import EventFd
from ..owned import Owned
from ..virtqueue import TRANSMITQ, VRINGS, check_num, pair_of, queue_of, receiveq, ring_len

COUNTERS = {
    "packets": r.VQ_PACKETS,
    "bytes": r.VQ_BYTES,
    "dropped": r.VQ_DROPPED,
    "calls": r.VQ_CALLS,
    "kicks": r.VQ_KICKS,
}


class UserspaceBackend(Owned):
    """A `Backend` for queue pair *pair* of a `Datapath`. Its caller steps the datapath, which must not run during a verb.

    Guest memory and dirty log are those of the whole datapath.
    """

    def __init__(self, datapath: Datapath, pair: int) -> None:
        self.datapath = datapath
        self.pair = pair
        self.features = 0
        self._rows: Words = datapath.vqs[receiveq(pair) :][:VRINGS]

    def set_mtu(self, mtu: int) -> None:
        if wrong := f.mtu_error(mtu):
            raise BackendError("set_mtu", errno.EINVAL, None, wrong)
        self._rows[:, r.VQ_MAX_FRAME] = mtu + spec.ETH_HLEN

    def set_features(self, features: int) -> None:
        if (features ^ self.features) & ~f.VHOST_F_LOG_ALL and self._rows[:, r.VQ_BOUND].any():
            raise BackendError("set_features", errno.EBUSY, None, "a ring is bound")
        if features & f.VIRTIO_F_RING_PACKED:
            raise BackendError("set_features", errno.EOPNOTSUPP, None, "packed rings are not supported")
        self.features = features
        if features & f.VHOST_F_LOG_ALL:
            self.datapath.logging.add(self.pair)
        else:
            self.datapath.logging.discard(self.pair)
        for index, row in enumerate(self._rows):
            row[r.VQ_EVENT_IDX] = int(bool(features & f.VIRTIO_RING_F_EVENT_IDX))
            row[r.VQ_INDIRECT] = int(bool(features & f.VIRTIO_RING_F_INDIRECT_DESC))
            row[r.VQ_MRG_RXBUF] = int(bool(features & f.VIRTIO_NET_F_MRG_RXBUF))
            row[r.VQ_HDR_LEN] = f.header_len(features)
            to_guest = f.guest_offload_mask(features)
            if not features & f.VIRTIO_NET_F_MTU:
                row[r.VQ_MAX_FRAME] = 0
            row[r.VQ_OFFLOADS] = f.host_offload_mask(features) if index == TRANSMITQ else to_guest

    def set_memory(self, memory: GuestMemory) -> None:
        if memory.closed:
            raise BackendError("set_memory", errno.EFAULT, None, "the guest memory is closed")
        dp = self.datapath
        wanted = dp.vqs[dp.vqs[:, r.VQ_BOUND] != 0]  # a copy: nothing changes before all can
        try:
            for row in wanted:
                _translate(memory, row)
        except ConfigError as e:
            raise BackendError("set_memory", errno.EFAULT, None, str(e)) from e
        dp.vqs[dp.vqs[:, r.VQ_BOUND] != 0] = wanted
        dp.memory = memory

    def set_log(self, log: DirtyLog | None) -> None:
        self.datapath.log = log

    def set_vring_num(self, index: int, num: int) -> None:
        row = self._row("set_vring_num", index)
        if row[r.VQ_BOUND]:
            raise BackendError("set_vring_num", errno.EBUSY, index, "the ring is bound")
        try:
            check_num(num)
        except ConfigError as e:
            raise BackendError("set_vring_num", errno.EINVAL, index, str(e)) from e
        row[r.VQ_NUM] = num
        self.datapath.translated[queue_of(self.pair, index)] = None  # the ring's parts have another length

    def set_vring_base(self, index: int, base: int) -> None:
        row = self._row("set_vring_base", index)
        if row[r.VQ_BOUND]:
            raise BackendError("set_vring_base", errno.EBUSY, index, "the ring is bound")
        if not 0 <= base <= 0xFFFF:
            raise BackendError("set_vring_base", errno.EINVAL, index, f"base {base} is not between 0 and 65535")
        row[r.VQ_LAST_AVAIL_IDX] = base
        row[r.VQ_AVAIL_IDX] = base

    def get_vring_base(self, index: int) -> int:
        row = self._row("get_vring_base", index)
        if row[r.VQ_BOUND]:
            self.set_backend(index, None)
        return int(row[r.VQ_LAST_AVAIL_IDX])

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        row = self._row("set_vring_addr", index)
        aligned = not (desc % spec.VIRTQ_DESC_ALIGN or avail % spec.VIRTQ_AVAIL_ALIGN or used % spec.VIRTQ_USED_ALIGN)
        if not aligned:
            raise BackendError(
                "set_vring_addr",
                errno.EINVAL,
                index,
                f"desc {desc:#x}, avail {avail:#x}, used {used:#x}: not all are aligned to 16, 2 and 4 bytes",
            )
        if not all(0 <= address < ADDRESS_LIMIT for address in (desc, avail, used)):
            raise BackendError(
                "set_vring_addr",
                errno.EFAULT,
                index,
                f"desc {desc:#x}, avail {avail:#x}, used {used:#x}: not all are below {ADDRESS_LIMIT:#x}",
            )
        if log_used is not None and not 0 <= log_used < ADDRESS_LIMIT:
            raise BackendError(
                "set_vring_addr", errno.EFAULT, index, f"log address {log_used:#x} is not below {ADDRESS_LIMIT:#x}"
            )
        wanted = row.copy()
        wanted[r.VQ_DESC_GPA], wanted[r.VQ_AVAIL_GPA], wanted[r.VQ_USED_GPA] = (
            desc,
            avail,
            used,
        )
        wanted[r.VQ_LOG_USED] = -1 if log_used is None else log_used
        memory = self.datapath.memory
        if memory is None or not row[r.VQ_NUM]:
            raise BackendError("set_vring_addr", errno.EFAULT, index, "set_memory and set_vring_num come first")
        try:
            _translate(memory, wanted)
        except ConfigError as e:
            raise BackendError("set_vring_addr", errno.EFAULT, index, str(e)) from e
        row[:] = wanted
        self.datapath.translated[queue_of(self.pair, index)] = memory

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        self._row("set_vring_kick", index)
        self.datapath.notify[queue_of(self.pair, index), 0] = kick.fd if kick else -1

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        self._row("set_vring_call", index)
        self.datapath.notify[queue_of(self.pair, index), 1] = call.notify if call else -1

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self._row("set_vring_enable", index)[r.VQ_ENABLED] = int(enabled)

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        row = self._row("set_vring_inflight", index)
        row[r.VQ_INFLIGHT], row[r.VQ_JOURNAL] = area, journal

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        row = self._row("set_backend", index)
        dp = self.datapath
        other = self._rows[1 - index]
        if endpoint is None:
            if row[r.VQ_BOUND]:
                row[r.VQ_BOUND] = 0
                if not other[r.VQ_BOUND]:
                    dp.endpoint.stop_polling(self.pair, dp)
                if not dp.vqs[:, r.VQ_BOUND].any():
                    dp.let_go()
            return
        if dp.memory is None or row[r.VQ_NUM] == 0 or row[r.VQ_DESC_GPA] < 0:
            raise BackendError(
                "set_backend", errno.EFAULT, index, "set_memory, set_vring_num and set_vring_addr come first"
            )
        if dp.endpoint is not endpoint and dp.bound:
            raise BackendError("set_backend", errno.EBUSY, index, "another endpoint is bound")
        if self.pair >= endpoint.queues:
            raise BackendError(
                "set_backend",
                errno.ENOTSOCK,
                index,
                f"{endpoint.name} has {endpoint.queues} queues: none for queue pair {self.pair}",
            )
        try:
            mem = dp.memory.mem
            if dp.translated[queue_of(self.pair, index)] is not dp.memory:
                _translate(dp.memory, row)
                dp.translated[queue_of(self.pair, index)] = dp.memory
            endpoint.start_polling(self.pair, dp)
        except ConfigError as e:
            raise BackendError("set_backend", errno.EFAULT, index, str(e)) from e
        except EndpointError as e:
            raise BackendError("set_backend", errno.EBUSY, index, str(e)) from e
        dp.endpoint = endpoint
        bases = np.array([(queue_of(self.pair, index), row[r.VQ_LAST_AVAIL_IDX])])
        bind(mem, dp.vqs, endpoint.rows, dp.dirty_bits, bases)

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        dp = self.datapath
        memory, known = dp.memory, dp.translated
        pairs = {pair_of(n) for n, _ in bases}
        queues = range(min(pairs), max(pairs) + 1)
        if (
            memory is None
            or memory.closed
            or dp.bound
            or len(queues) != len(pairs)
            or queues.stop > endpoint.queues
            or not all(known[n] is memory for n, _ in bases)
            or not endpoint.start_polling_all(queues, dp)
        ):
            return False
        dp.endpoint = endpoint
        rows = np.fromiter(chain.from_iterable(bases), np.int64, 2 * len(bases)).reshape(-1, 2)
        bind(memory.mem, dp.vqs, endpoint.rows, dp.dirty_bits, rows)
        return True

    @property
    def site(self) -> object:
        return self.datapath

    @contextmanager
    def hold(self) -> Iterator[None]:
        yield

    def park(self, parked: bool) -> None:
        """Nothing runs but in the caller's thread. @private"""

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Call neither: `Datapath.run` tells its caller. @private"""
        return lambda: None

    def status(self, index: int) -> int:
        return int(self._rows[index, r.VQ_STATUS])

    def counters(self, index: int) -> dict[str, int]:
        return {name: int(self._rows[index, slot]) for name, slot in COUNTERS.items()}

    def _row(self, verb: str, index: int) -> Words:
        if not 0 <= index < VRINGS:
            raise BackendError(verb, errno.ENOBUFS, index, f"vring {index} is neither 0 nor 1")
        row: Words = self._rows[index]
        return row


def _translate(memory: GuestMemory, row: Words) -> None:
    """Set the window offsets of a row from its guest addresses; ConfigError, and no change, if one is outside."""
    lengths = ring_len(int(row[r.VQ_NUM]))
    slots = (r.VQ_DESC_GPA, r.VQ_AVAIL_GPA, r.VQ_USED_GPA)
    offsets = [memory.translate(int(row[slot]), length) for slot, length in zip(slots, lengths, strict=True)]
    row[r.VQ_DESC], row[r.VQ_AVAIL], row[r.VQ_USED] = offsets
