"""The vhost verbs as values, each with the rules that hold at every place that runs verbs.

A `DeviceVerb` concerns a whole vhost device, a `RingVerb` one of its two rings. A place that runs verbs calls `check` first,
which raises BackendError, with the errno of the kernel's vhost, before anything has changed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from vnetdp_kernels import spec

from ..endpoints.base import Endpoint
from ..errors import BackendError, ConfigError
from ..shared.memory import ADDRESS_LIMIT, DirtyLog, GuestMemory
from ..shared.notify import EventFd
from ..virtio import features as f
from ..virtio.queue import VRINGS, check_num


class State(Protocol):
    """The facts about a vhost device that decide whether it takes a verb."""

    @property
    def features(self) -> int:
        """The feature bits that were set."""

    @property
    def memory(self) -> GuestMemory | None:
        """Guest memory; None if none was set."""

    def is_bound(self, index: int) -> bool:
        """Return whether a ring is bound."""

    def num(self, index: int) -> int:
        """Return a ring's size; 0 if none was set."""

    def has_addresses(self, index: int) -> bool:
        """Return whether a ring's addresses were set."""


@dataclass(frozen=True, slots=True)
class DeviceVerb:
    """A verb of a whole vhost device."""

    name: ClassVar[str]
    index: ClassVar[None] = None

    def check(self, state: State) -> None:
        """Raise BackendError if a device in this state does not take the verb."""


@dataclass(frozen=True, slots=True)
class RingVerb:
    """A verb of ring *index* of a vhost device: 0 the receiveq, 1 the transmitq."""

    name: ClassVar[str]
    index: int

    def check(self, state: State) -> None:
        """Raise BackendError if a device in this state does not take the verb; ENOBUFS if it has no such ring."""
        if not 0 <= self.index < VRINGS:
            raise refusal(self, errno.ENOBUFS, f"vring {self.index} is neither 0 nor 1")


Verb: TypeAlias = DeviceVerb | RingVerb


def refusal(verb: Verb, code: int, detail: str) -> BackendError:
    """Return the error of a verb that is not done."""
    return BackendError(verb.name, code, verb.index, detail)


def _check_not_bound(verb: RingVerb, state: State) -> None:
    if state.is_bound(verb.index):
        raise refusal(verb, errno.EBUSY, "the ring is bound")


# --- of a device ---


@dataclass(frozen=True, slots=True)
class SetMtu(DeviceVerb):
    name = "set_mtu"
    mtu: int

    def check(self, state: State) -> None:
        if wrong := f.mtu_error(self.mtu):
            raise refusal(self, errno.EINVAL, wrong)


@dataclass(frozen=True, slots=True)
class SetFeatures(DeviceVerb):
    name = "set_features"
    features: int

    def check(self, state: State) -> None:
        changed = (self.features ^ state.features) & ~f.VHOST_F_LOG_ALL
        if changed and any(state.is_bound(index) for index in range(VRINGS)):
            raise refusal(self, errno.EBUSY, "a ring is bound")


@dataclass(frozen=True, slots=True)
class SetMemory(DeviceVerb):
    name = "set_memory"
    memory: GuestMemory

    def check(self, state: object = None) -> None:
        if self.memory.closed:
            raise refusal(self, errno.EFAULT, "the guest memory is closed")

    def check_shared(self) -> None:
        """Refuse memory that another process can't have."""
        if self.memory.private:
            raise refusal(
                self, errno.EBADF, "the guest memory is private: for another process make it with private=False"
            )


@dataclass(frozen=True, slots=True)
class SetLog(DeviceVerb):
    name = "set_log"
    log: DirtyLog | None


# --- of a ring ---


@dataclass(frozen=True, slots=True)
class SetVringNum(RingVerb):
    name = "set_vring_num"
    num: int

    def check(self, state: State) -> None:
        RingVerb.check(self, state)
        _check_not_bound(self, state)
        try:
            check_num(self.num)
        except ConfigError as e:
            raise refusal(self, errno.EINVAL, str(e)) from e


@dataclass(frozen=True, slots=True)
class SetVringBase(RingVerb):
    name = "set_vring_base"
    base: int

    def check(self, state: State) -> None:
        RingVerb.check(self, state)
        _check_not_bound(self, state)
        if not 0 <= self.base <= 0xFFFF:
            raise refusal(self, errno.EINVAL, f"base {self.base} is not between 0 and 65535")


@dataclass(frozen=True, slots=True)
class GetVringBase(RingVerb):
    name = "get_vring_base"


@dataclass(frozen=True, slots=True)
class SetVringAddr(RingVerb):
    name = "set_vring_addr"
    desc: int
    avail: int
    used: int
    log_used: int | None = None

    def check(self, state: State) -> None:
        RingVerb.check(self, state)
        desc, avail, used, log_used = self.desc, self.avail, self.used, self.log_used
        if desc % spec.VIRTQ_DESC_ALIGN or avail % spec.VIRTQ_AVAIL_ALIGN or used % spec.VIRTQ_USED_ALIGN:
            raise refusal(self, errno.EINVAL, f"{self._addresses()}: not all are aligned to 16, 2 and 4 bytes")
        if min(desc, avail, used) < 0 or max(desc, avail, used) >= ADDRESS_LIMIT:
            raise refusal(self, errno.EFAULT, f"{self._addresses()}: not all are below {ADDRESS_LIMIT:#x}")
        if log_used is not None and not 0 <= log_used < ADDRESS_LIMIT:
            raise refusal(self, errno.EFAULT, f"log address {log_used:#x} is not below {ADDRESS_LIMIT:#x}")
        if state.memory is None or not state.num(self.index):
            raise refusal(self, errno.EFAULT, "set_memory and set_vring_num come first")

    def _addresses(self) -> str:
        return f"desc {self.desc:#x}, avail {self.avail:#x}, used {self.used:#x}"


@dataclass(frozen=True, slots=True)
class SetVringKick(RingVerb):
    name = "set_vring_kick"
    kick: EventFd | None


@dataclass(frozen=True, slots=True)
class SetVringCall(RingVerb):
    name = "set_vring_call"
    call: EventFd | None


@dataclass(frozen=True, slots=True)
class SetVringEnable(RingVerb):
    name = "set_vring_enable"
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetVringInflight(RingVerb):
    name = "set_vring_inflight"
    area: int
    journal: int


@dataclass(frozen=True, slots=True)
class SetBackend(RingVerb):
    name = "set_backend"
    endpoint: Endpoint | None

    def check(self, state: State) -> None:
        RingVerb.check(self, state)
        if self.endpoint is None:
            return
        if state.memory is None or not state.num(self.index) or not state.has_addresses(self.index):
            raise refusal(self, errno.EFAULT, "set_memory, set_vring_num and set_vring_addr come first")
