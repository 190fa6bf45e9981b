"""Endpoints that live wholly in kernels: null, echo, macswap, reflect and generate."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from vnetdp_kernels import layout

from ..errors import EndpointError
from .base import Endpoint

_MAX_COUNT = 1 << 62


class NullEndpoint(Endpoint):
    """Takes every frame and gives none."""

    kind = layout.KIND_NULL
    name = "null"


class EchoEndpoint(Endpoint):
    """Sends every frame back as it came, copied once from ring to ring."""

    kind = layout.KIND_ECHO
    name = "echo"


class MacswapEndpoint(Endpoint):
    """As echo, with the Ethernet addresses exchanged."""

    kind = layout.KIND_MACSWAP
    name = "macswap"


class ReflectEndpoint(Endpoint):
    """A host that has every IPv4 address: answers ARP requests and ICMP echo, and takes the rest."""

    kind = layout.KIND_REFLECT
    name = "reflect"


@dataclass(frozen=True)
class Ledger:
    """What became of numbered frames. `sent` is the other side's; `lost` = sent, and not delivered by now."""

    sent: int = 0
    delivered: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.reordered or self.corrupted)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __add__(self, other: Ledger) -> Ledger:
        mine, theirs = asdict(self), asdict(other)
        return Ledger(**{key: mine[key] + theirs[key] for key in mine})

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in asdict(self).items())


class GenerateEndpoint(Endpoint):
    """Sends numbered frames, and enters those that come back from the other side into the ledger.

    size: bytes of a frame, Ethernet header included, FCS and virtio_net_hdr not. rate: frames a second and queue,
    0 = as fast as the ring takes them. count: frames a queue, -1 = no end. Queue i stamps flow i.
    """

    kind = layout.KIND_GENERATE
    name = "generate"

    def __init__(
        self,
        queues: int = 1,
        size: int = 64,
        rate: float = 0.0,
        count: int = -1,
        block_fd: int | None = None,
    ) -> None:
        self.check(size, rate, count)
        super().__init__(queues, block_fd)
        self.count = count
        if block_fd is None:
            self.rows[:, layout.EP_SIZE] = size
            self.rows[:, layout.EP_INTERVAL_NS] = round(1e9 / rate) if rate else 0
            self.rows[:, layout.EP_LIMIT] = count
            self.rows[:, layout.EP_CHECK] = 1

    @staticmethod
    def check(size: int = 64, rate: float = 0.0, count: int = -1) -> None:
        """Raise EndpointError for what no generator can do."""
        if not layout.LEDGER_MIN_LEN <= size <= layout.MAX_FRAME_LEN:
            raise EndpointError(
                f"generate: size {size} is not between {layout.LEDGER_MIN_LEN} and {layout.MAX_FRAME_LEN}"
            )
        if rate and not 1e-9 <= rate <= 1e9:
            raise EndpointError(f"generate: rate {rate} is not between 1e-9 and 1e9 frames a second, nor 0")
        if not -1 <= count <= _MAX_COUNT:
            raise EndpointError(f"generate: count {count} is not between 0 and 2^62")

    @property
    def longest_frame(self) -> int:
        return int(self.rows[:, layout.EP_SIZE].max())

    @property
    def sent(self) -> int:
        """Frames made so far, all queues: those in flight and in hand included."""
        return int(self.rows[:, layout.EP_SEQ].sum())

    def stop(self) -> None:
        """Make no frames after those made by now. What is on its way still arrives."""
        self.rows[:, layout.EP_LIMIT] = self.rows[:, layout.EP_SEQ]

    @property
    def finished(self) -> bool:
        limit = self.rows[:, layout.EP_LIMIT]
        return bool(((limit >= 0) & (self.rows[:, layout.EP_SEQ] >= limit)).all())

    def ledger_against(self, sender: GenerateEndpoint) -> Ledger:
        """Return what became of the frames that *sender*, across the rings, has made."""
        total = self.ledger.sum(axis=0)
        delivered, sent = int(total[layout.LEDGER_DELIVERED]), sender.sent
        return Ledger(
            sent=sent,
            delivered=delivered,
            lost=sent - delivered,
            duplicated=int(total[layout.LEDGER_DUPLICATED]),
            reordered=int(total[layout.LEDGER_REORDERED]),
            corrupted=int(total[layout.LEDGER_CORRUPTED]),
        )


def drained(one: GenerateEndpoint, other: GenerateEndpoint, quiet_s: float = 5.0) -> Ledger:
    """Have both make no more frames, wait until those made have arrived, and return what became of them, both ways.

    Given up once none has arrived for *quiet_s* seconds: on a machine that is busy elsewhere they take their time.
    """
    one.stop()
    other.stop()
    delivered, since = -1, 0.0
    while True:
        ledger = one.ledger_against(other) + other.ledger_against(one)
        now = time.monotonic()
        if ledger.delivered != delivered:
            delivered, since = ledger.delivered, now
        if ledger.lost <= 0 or now - since > quiet_s:
            return ledger
        time.sleep(0.01)
