"""UserspaceBackend: the vhost verbs, applied to a Datapath in the caller's thread.

This backend is QEMU's own virtio-net, run by the device's loop, and the inside of every vhost worker.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.virtq.bind import bind

from ..datapath.datapath import Datapath
from ..endpoints.base import Endpoint
from ..errors import ConfigError, EndpointError, MachineError
from ..shared.memory import GuestMemory, Words
from ..system.owned import Owned
from ..virtio import features as f
from ..virtio.queue import RECEIVEQ, TRANSMITQ, VRINGS, pair_of, queue_of, receiveq, ring_len
from .base import Backend
from .verbs import (
    GetVringBase,
    SetBackend,
    SetFeatures,
    SetLog,
    SetMemory,
    SetMtu,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringInflight,
    SetVringKick,
    SetVringNum,
    Verb,
    refusal,
)

COUNTERS = {
    "packets": r.VQ_PACKETS,
    "bytes": r.VQ_BYTES,
    "dropped": r.VQ_DROPPED,
    "calls": r.VQ_CALLS,
    "kicks": r.VQ_KICKS,
}


class UserspaceBackend(Backend, Owned):
    """A `Backend` for queue pair *pair* of a `Datapath`. Its caller steps the datapath, which must not run during a verb.

    Guest memory and dirty log are those of the whole datapath.
    """

    def __init__(self, datapath: Datapath, pair: int) -> None:
        self.datapath = datapath
        self.pair = pair
        self.features = 0
        self._rows: Words = datapath.vqs[receiveq(pair) :][:VRINGS]

    def apply(self, verb: Verb) -> int:
        verb.check(self)
        return self._RUN[type(verb)](self, verb) or 0

    # --- `State`, which the rules of verbs look at ---

    @property
    def memory(self) -> GuestMemory | None:
        return self.datapath.memory

    def is_bound(self, index: int) -> bool:
        return bool(self._rows[index, r.VQ_BOUND])

    def num(self, index: int) -> int:
        return int(self._rows[index, r.VQ_NUM])

    def has_addresses(self, index: int) -> bool:
        return bool(self._rows[index, r.VQ_DESC_GPA] >= 0)

    # --- the verbs ---

    def _set_mtu(self, verb: SetMtu) -> None:
        self._rows[:, r.VQ_MAX_FRAME] = verb.mtu + spec.ETH_HLEN

    def _set_features(self, verb: SetFeatures) -> None:
        features = verb.features
        if features & f.VIRTIO_F_RING_PACKED:
            raise refusal(verb, errno.EOPNOTSUPP, "packed rings are not supported")
        self.features = features
        if features & f.VHOST_F_LOG_ALL:
            self.datapath.logging.add(self.pair)
        else:
            self.datapath.logging.discard(self.pair)
        rows = self._rows
        rows[:, r.VQ_EVENT_IDX] = bool(features & f.VIRTIO_RING_F_EVENT_IDX)
        rows[:, r.VQ_INDIRECT] = bool(features & f.VIRTIO_RING_F_INDIRECT_DESC)
        rows[:, r.VQ_MRG_RXBUF] = bool(features & f.VIRTIO_NET_F_MRG_RXBUF)
        rows[:, r.VQ_HDR_LEN] = f.header_len(features)
        rows[RECEIVEQ, r.VQ_OFFLOADS] = f.guest_offload_mask(features)
        rows[TRANSMITQ, r.VQ_OFFLOADS] = f.host_offload_mask(features)
        if not features & f.VIRTIO_NET_F_MTU:
            rows[:, r.VQ_MAX_FRAME] = 0

    def _set_memory(self, verb: SetMemory) -> None:
        dp = self.datapath
        if dp.bound:
            wanted = dp.vqs[dp.vqs[:, r.VQ_BOUND] != 0]  # a copy: nothing changes before all can
            try:
                for row in wanted:
                    _translate(verb.memory, row)
            except ConfigError as e:
                raise refusal(verb, errno.EFAULT, str(e)) from e
            dp.vqs[dp.vqs[:, r.VQ_BOUND] != 0] = wanted
        dp.memory = verb.memory

    def _set_log(self, verb: SetLog) -> None:
        self.datapath.log = verb.log

    def _set_vring_num(self, verb: SetVringNum) -> None:
        self._rows[verb.index, r.VQ_NUM] = verb.num
        self.datapath.translated[queue_of(self.pair, verb.index)] = None  # the ring's parts have another length

    def _set_vring_base(self, verb: SetVringBase) -> None:
        row = self._rows[verb.index]
        row[r.VQ_LAST_AVAIL_IDX] = verb.base
        row[r.VQ_AVAIL_IDX] = verb.base

    def _get_vring_base(self, verb: GetVringBase) -> int:
        self._unbind(verb.index)
        return int(self._rows[verb.index, r.VQ_LAST_AVAIL_IDX])

    def _set_vring_addr(self, verb: SetVringAddr) -> None:
        wanted = self._rows[verb.index].copy()
        wanted[r.VQ_DESC_GPA], wanted[r.VQ_AVAIL_GPA], wanted[r.VQ_USED_GPA] = verb.desc, verb.avail, verb.used
        wanted[r.VQ_LOG_USED] = -1 if verb.log_used is None else verb.log_used
        memory = self.datapath.memory
        assert memory is not None
        try:
            _translate(memory, wanted)
        except ConfigError as e:
            raise refusal(verb, errno.EFAULT, str(e)) from e
        self._rows[verb.index] = wanted
        self.datapath.translated[queue_of(self.pair, verb.index)] = memory

    def _set_vring_kick(self, verb: SetVringKick) -> None:
        fd = -1 if verb.kick is None else verb.kick.made if self.datapath.stepped else verb.kick.fd
        self.datapath.notify[queue_of(self.pair, verb.index), 0] = fd

    def _set_vring_call(self, verb: SetVringCall) -> None:
        fd = -1 if verb.call is None else verb.call.made if self.datapath.stepped else verb.call.notify
        self.datapath.notify[queue_of(self.pair, verb.index), 1] = fd

    def _set_vring_enable(self, verb: SetVringEnable) -> None:
        self._rows[verb.index, r.VQ_ENABLED] = int(verb.enabled)

    def _set_vring_inflight(self, verb: SetVringInflight) -> None:
        row = self._rows[verb.index]
        row[r.VQ_INFLIGHT], row[r.VQ_JOURNAL] = verb.area, verb.journal

    def _set_backend(self, verb: SetBackend) -> None:
        if verb.endpoint is None:
            self._unbind(verb.index)
        else:
            self._bind(verb, verb.endpoint)

    def _unbind(self, index: int) -> None:
        row, dp = self._rows[index], self.datapath
        if row[r.VQ_BOUND]:
            row[r.VQ_BOUND] = 0
            if not self._rows[1 - index, r.VQ_BOUND]:
                dp.endpoint.stop_polling(self.pair, dp)
                if not dp.vqs[:, r.VQ_BOUND].any():
                    dp.let_go()

    def _bind(self, verb: SetBackend, endpoint: Endpoint) -> None:
        row, dp = self._rows[verb.index], self.datapath
        if dp.endpoint is not endpoint and dp.bound:
            raise refusal(verb, errno.EBUSY, "another endpoint is bound")
        if self.pair >= endpoint.queues:
            raise refusal(
                verb, errno.ENOTSOCK, f"{endpoint.name} has {endpoint.queues} queues: none for queue pair {self.pair}"
            )
        n, memory = queue_of(self.pair, verb.index), dp.memory
        assert memory is not None
        try:
            mem = memory.mem
            if dp.translated[n] is not memory:
                _translate(memory, row)
                dp.translated[n] = memory
            self._open_wakes(endpoint)
            endpoint.start_polling(self.pair, dp)
        except MachineError as e:
            raise refusal(verb, e.errno or errno.EMFILE, str(e)) from e
        except ConfigError as e:
            raise refusal(verb, errno.EFAULT, str(e)) from e
        except EndpointError as e:
            raise refusal(verb, errno.EBUSY, str(e)) from e
        dp.endpoint = endpoint
        bind(mem, dp.vqs, endpoint.rows, dp.dirty_bits, np.array([(n, row[r.VQ_LAST_AVAIL_IDX])]))

    def _open_wakes(self, endpoint: Endpoint) -> None:
        if not self.datapath.stepped:
            endpoint.open_wakes()

    _RUN: ClassVar[dict[type, Callable[..., int | None]]] = {
        SetMtu: _set_mtu,
        SetFeatures: _set_features,
        SetMemory: _set_memory,
        SetLog: _set_log,
        SetVringNum: _set_vring_num,
        SetVringBase: _set_vring_base,
        GetVringBase: _get_vring_base,
        SetVringAddr: _set_vring_addr,
        SetVringKick: _set_vring_kick,
        SetVringCall: _set_vring_call,
        SetVringEnable: _set_vring_enable,
        SetVringInflight: _set_vring_inflight,
        SetBackend: _set_backend,
    }

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
        ):
            return False
        try:
            self._open_wakes(endpoint)
        except MachineError:
            return False  # each ring that is bound alone tells the reason
        if not endpoint.start_polling_all(queues, dp):
            return False
        dp.endpoint = endpoint
        rows = np.fromiter(chain.from_iterable(bases), np.int64, 2 * len(bases)).reshape(-1, 2)
        bind(memory.mem, dp.vqs, endpoint.rows, dp.dirty_bits, rows)
        return True

    @property
    def worker(self) -> object:
        return self.datapath

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Call neither: `Datapath.run` tells its caller. @private"""
        return lambda: None

    def status(self, index: int) -> int:
        return int(self._rows[index, r.VQ_STATUS])

    def row(self, index: int) -> Words:
        row: Words = self._rows[index]
        return row

    def counters(self, index: int) -> dict[str, int]:
        return {name: int(self._rows[index, slot]) for name, slot in COUNTERS.items()}


def _translate(memory: GuestMemory, row: Words) -> None:
    """Set the window offsets of a row from its guest addresses; ConfigError, and no change, if one is outside."""
    lengths = ring_len(int(row[r.VQ_NUM]))
    slots = (r.VQ_DESC_GPA, r.VQ_AVAIL_GPA, r.VQ_USED_GPA)
    offsets = [memory.translate(int(row[slot]), length) for slot, length in zip(slots, lengths, strict=True)]
    row[r.VQ_DESC], row[r.VQ_AVAIL], row[r.VQ_USED] = offsets
