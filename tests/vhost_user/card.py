"""A guest's card on a front end of ours, and back ends for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, scaled, stand_still, wait_for
from tests.support.vhost_user import InThread
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.vhost_user.front_end import conversation
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp_kernels import rows as r

NUM = 256


class Card:
    """A guest's card on *front_end*: a generator sends through it, and everything comes back, whoever serves it."""

    def __init__(self, front_end: VhostUserFrontEnd, pairs: int = 1, memory: GuestMemory | None = None) -> None:
        with ExitStack() as stack:
            self.memory = stack.enter_context(memory or memory_for(pairs, NUM))
            wire = stack.enter_context(EchoEndpoint(pairs))
            self.generator = stack.enter_context(GenerateEndpoint(pairs))
            self.device = stack.enter_context(
                NetDevice(
                    self.memory, wire, queue_pairs=pairs, offered=front_end.features, vhost=front_end.backends,
                    max_num=NUM,
                )
            )  # fmt: skip
            self.driver = stack.enter_context(
                Driver(self.device, self.memory, self.generator, queue_pairs=pairs, num=NUM)
            )
            assert self.device.owner is Owner.VHOST, self.device.last_error
            self.driver.start()
            self.close = stack.pop_all().close

    def wait_for_more(self, frames: int = scaled(2000, 50)) -> None:
        """Wait until each pair has got so many frames back."""
        wanted = self.generator.ledger[:, r.LEDGER_DELIVERED] + frames

        def more() -> bool:
            self.driver.check()
            assert not self.device.ring_errors()
            return bool((self.generator.ledger[:, r.LEDGER_DELIVERED] >= wanted).all())

        wait_for(more, f"{frames} more frames on each pair; {self.device.owner}, {self.device.last_error}")

    def is_of(self, owner: Owner) -> None:
        assert self.device.owner is owner, self.device.last_error

    def finish(self) -> None:
        """`all_back`, and close the device."""
        self.all_back()
        self.close()

    def all_back(self) -> None:
        """Send no more; every frame that was sent has come back once, and in order."""
        with self.driver.paused():  # or a frame that is just being made comes after the last was seen
            self.generator.stop()
        wait_for(lambda: int(self.generator.ledger[:, r.LEDGER_DELIVERED].sum()) >= self.generator.sent, "all are back")
        ledger = self.generator.ledger_against(self.generator)
        assert ledger.clean, ledger


@contextmanager
def attached(path: str, pairs: int = 1, **options: Any) -> Iterator[VhostUserFrontEnd]:
    front_end = VhostUserFrontEnd(path, pairs, queue_size=NUM, **options)
    try:
        wait_for(lambda: front_end.connect(PATIENCE), "the back end takes a front end")
        yield front_end
    finally:
        front_end.close()


def hang(process: subprocess.Popen[bytes], front_end: VhostUserFrontEnd) -> None:
    """Have the back end hang, and its front end wait for no answer any longer than a moment: none can come."""
    stand_still(process.pid)
    assert front_end._conversation is not None
    front_end._conversation._timeout_s = 0.1


@contextmanager
def in_thread(folder: Path, inband: bool = False) -> Iterator[InThread]:
    """A back end in this process; it may be closed in the block already. One that is left lets go, however long it takes."""
    with no_descriptor_leaks(), patch.object(conversation, "_LETS_GO_S", PATIENCE):
        back_end = InThread(folder, inband)
        try:
            yield back_end
        finally:
            if back_end.alive():
                back_end.close()
