"""A verb that fails at a back end of ours costs the front end its request, and the next front end nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.programs.test_drive_serve import served
from tests.support.by_hand import no_descriptor_leaks
from tests.vhost_user.card import NUM, Card, attached
from vnetdp import (
    BackendError,
    DirtyLog,
    Driver,
    EchoEndpoint,
    Fault,
    Faults,
    MailboxEndpoint,
    NetDevice,
    Owner,
    memory_for,
)

AT_START = [
    "set_features",
    "set_memory",
    "set_vring_num",
    "set_vring_addr",
    "set_vring_kick",
    "set_vring_call",
    "set_backend",
]


@pytest.mark.parametrize("verb", AT_START)
def test_a_front_end_whose_request_fails_falls_back_and_the_next_one_is_served(tmp_path: Path, verb: str) -> None:
    faults = Faults([Fault(verb, times=-1, code=errno.ENOMEM)])
    path = tmp_path / "s"
    with no_descriptor_leaks(), EchoEndpoint() as endpoint, served(endpoint, path, faults=faults):
        with (
            attached(str(path)) as front_end,
            memory_for(1, NUM) as memory,
            MailboxEndpoint() as wire,
            NetDevice(memory, wire, offered=front_end.features, vhost=front_end, max_num=NUM) as device,
            Driver(device, memory, num=NUM),
        ):
            assert device.owner is Owner.USERSPACE
            assert device.fallbacks > 0
        assert faults[0].hits > 0
        faults.clear()
        is_served(path)


@pytest.mark.parametrize("verb", ["unbind", "get_vring_base"])
def test_a_ring_that_cannot_be_given_back_is_free_for_the_next_front_end(tmp_path: Path, verb: str) -> None:
    faults = Faults([Fault(verb, times=-1)])
    path = tmp_path / "s"
    with no_descriptor_leaks(), EchoEndpoint() as endpoint, served(endpoint, path, faults=faults):
        with attached(str(path)) as front_end:
            card = Card(front_end)
            card.wait_for_more()
            card.device.set_use_vhost(False)
            card.is_of(Owner.USERSPACE)
            assert faults[0].hits > 0
            card.wait_for_more()
            card.close()
        faults.clear()
        is_served(path)


def test_a_dirty_log_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    faults = Faults()
    path = tmp_path / "s"
    with no_descriptor_leaks(), EchoEndpoint() as endpoint, served(endpoint, path, faults=faults):
        with attached(str(path)) as front_end:
            card = Card(front_end)
            with DirtyLog(card.memory.end) as log:
                faults.append(Fault("set_log"))
                with pytest.raises(BackendError):
                    card.device.set_log(log)
                card.wait_for_more()
                card.device.set_log(log)
                card.wait_for_more()
                card.device.set_log(None)
                card.close()
        is_served(path)


def is_served(path: Path) -> None:
    """A front end attaches, and its frames come back."""
    with attached(str(path)) as front_end:
        card = Card(front_end)
        card.wait_for_more()
        card.finish()
