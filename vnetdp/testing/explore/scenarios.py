"""The scenarios: actors over tiny rings, and the rules that hold in the end of each schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SLOTS: Final = 4  # frames of a batch, at most


@dataclass(frozen=True)
class Scenario:
    """Actors over rings of *num* descriptors, and the frames between them."""

    says: str
    """The actors and their work, for people."""
    model: str = "tso"
    """The order of stores: `tso` or `weak`."""
    event_idx: bool = False
    """VIRTIO_RING_F_EVENT_IDX; otherwise the flags of the rings ask for notifications."""
    num: int = 2
    """Descriptors of each ring."""
    sent: tuple[int, ...] = ()
    """Frames of the guest, by batch: the next is there when the driver waits."""
    received: tuple[int, ...] = ()
    """Frames from the wire, by batch."""
    echo: bool = False
    """The device sends the guest's frames back."""
    driver: bool = True
    """False: no driver runs; the receiveq has buffers, and the transmitq the first batch of `sent`."""
    budget: int = -1
    """Frames that the device moves before it looks at its doorbell; -1 = any number."""
    reader: int = 0
    """Rounds of a reader of the dirty log; 0 = there is no log."""
    kills: int = 0
    """Deaths of the device, each at any operation; its successor goes on from the inflight area."""
    fresh: bool = False
    """The inflight area is empty: the first owner, too, begins with a recovery, and may be killed in it."""
    hand_overs: int = 0
    """Changes of owner, each whenever the loop looks at its doorbell."""

    @property
    def most_extra(self) -> int:
        """The most frames that `Job.extra` may be: without a driver each buffer is used once."""
        of_a_batch = SLOTS - max((*self.sent[-1:], *self.received[-1:]))
        return of_a_batch if self.driver else min(of_a_batch, self.num - max(sum(self.sent), sum(self.received)))


SCENARIOS: Final[dict[str, Scenario]] = {
    "transmit": Scenario("driver sends, device drains", sent=(1, 1)),
    "transmit-event-idx": Scenario("the same with EVENT_IDX", event_idx=True, sent=(1, 1)),
    "receive": Scenario("device fills, driver receives", received=(1, 1)),
    "receive-event-idx": Scenario("the same with EVENT_IDX", event_idx=True, received=(1, 1)),
    "transmit-weak": Scenario("driver sends, device drains", model="weak", event_idx=True, sent=(1, 1)),
    "receive-weak": Scenario("device fills, driver receives", model="weak", event_idx=True, received=(1, 1)),
    "hand-over": Scenario("driver sends; the device changes its owner", event_idx=True, sent=(1, 1), hand_overs=1),
    "dirty-log": Scenario(
        "device fills two batches; a reader takes the log twice", num=4, driver=False, received=(1, 2), reader=2
    ),
    "dirty-log-killed": Scenario(
        "device fills two batches, and is killed; a reader takes the log",
        num=4,
        driver=False,
        received=(1, 1),
        reader=1,
        kills=1,
    ),
    "recovery-killed": Scenario(
        "driver sends; the device is killed, and its successor, too", event_idx=True, sent=(1,), kills=2, fresh=True
    ),
    "transmit-killed": Scenario("driver sends; the device is killed", event_idx=True, sent=(1, 1), kills=1),
    "receive-killed": Scenario("driver receives; the device is killed", event_idx=True, received=(1, 1), kills=1),
    "echo-killed": Scenario(
        "device sends frames back one by one, and is killed twice",
        num=4,
        sent=(3,),
        driver=False,
        echo=True,
        budget=1,
        kills=2,
    ),
}
