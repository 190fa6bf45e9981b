"""A device's record of a virtqueue, and how it becomes the row that kernels read.

A `Virtqueue` is plain data: it can be copied, compared and sent. It is not trusted when it comes from outside:
`validate` checks each field as the device's registers would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vnetdp_kernels import spec

from ..errors import ConfigError
from ..shared.memory import ADDRESS_LIMIT

# A device numbers its queues: 2i is the receiveq of queue pair i, 2i + 1 the transmitq (Virtio 1.2, 5.1.2). The two vrings
# of a pair are numbered as in a vhost device: 0 and 1.
RECEIVEQ: Final = 0
TRANSMITQ: Final = 1
VRINGS: Final = 2  # of a queue pair


def queues_of(pairs: int) -> int:
    """Return the number of queues that *pairs* queue pairs have."""
    return VRINGS * pairs


def queue_of(pair: int, vring: int) -> int:
    """Return the number of a pair's queue; vring: RECEIVEQ or TRANSMITQ."""
    return VRINGS * pair + vring


def receiveq(pair: int) -> int:
    """Return the number of a pair's receiveq."""
    return queue_of(pair, RECEIVEQ)


def transmitq(pair: int) -> int:
    """Return the number of a pair's transmitq."""
    return queue_of(pair, TRANSMITQ)


def pair_of(queue: int) -> int:
    """Return the pair that a queue belongs to."""
    return queue // VRINGS


def vring_of(queue: int) -> int:
    """Return RECEIVEQ or TRANSMITQ."""
    return queue % VRINGS


def is_receiveq(queue: int) -> bool:
    """Return whether a queue is the receiveq of its pair."""
    return vring_of(queue) == RECEIVEQ


def partner_of(queue: int) -> int:
    """Return the other queue of a queue's pair."""
    return queue ^ 1


def ring_len(num: int) -> tuple[int, int, int]:
    """Return the bytes of the descriptor table, the avail ring and the used ring (Virtio 1.2, 2.7)."""
    return (
        spec.VIRTQ_DESC_SIZE * num,
        spec.VIRTQ_RING_ENTRIES + 2 * num + 2,
        spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * num + 2,
    )


def check_num(num: int) -> None:
    """Raise ConfigError unless *num* is a size a split queue may have (2.7): a power of two up to 32768."""
    if not 0 < num <= spec.VIRTQ_MAX_NUM or num & (num - 1):
        raise ConfigError(f"queue size {num} is not a power of two between 1 and {spec.VIRTQ_MAX_NUM}")


@dataclass
class Virtqueue:
    """The state of one split virtqueue of a device (Virtio 1.2, 2.7)."""

    num: int = 256
    """Its size in descriptors, a power of two up to 32768."""
    desc: int = -1
    """The guest address of the descriptor table; -1 if it was not set."""
    avail: int = -1
    """The guest address of the avail ring; -1 if it was not set."""
    used: int = -1
    """The guest address of the used ring; -1 if it was not set."""
    enabled: bool = False
    """True once the driver enabled it."""
    last_avail_idx: int = 0
    """The next avail index that the device takes, 0 to 65535; exact while the rings have no owner."""

    @property
    def has_addresses(self) -> bool:
        """True if all three addresses were set."""
        return self.desc >= 0 and self.avail >= 0 and self.used >= 0

    @property
    def setup(self) -> tuple[int, int, int, int]:
        """The size and addresses of the queue, which a backend has to be told beside its base. @private"""
        return self.num, self.desc, self.avail, self.used

    def validate(self) -> None:
        """Raise ConfigError unless a driver can have set this up."""
        check_num(self.num)
        if not 0 <= self.last_avail_idx <= 0xFFFF:
            raise ConfigError(f"last_avail_idx {self.last_avail_idx} is not between 0 and 65535")
        for name in ("desc", "avail", "used"):
            if getattr(self, name) >= ADDRESS_LIMIT:
                raise ConfigError(f"{name} address {getattr(self, name):#x} is not below {ADDRESS_LIMIT:#x}")
        if self.has_addresses:
            aligns = (spec.VIRTQ_DESC_ALIGN, spec.VIRTQ_AVAIL_ALIGN, spec.VIRTQ_USED_ALIGN)
            for name, align in zip(("desc", "avail", "used"), aligns, strict=True):
                if getattr(self, name) % align:
                    raise ConfigError(f"{name} address {getattr(self, name):#x} is not aligned to {align} bytes")
        elif self.enabled:
            raise ConfigError("a queue without addresses is enabled")
