"""A forked child goes on with its own copy of a world in private memory, and the parent with its own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks
from tests.world.bed import KINDS, Bed
from tests.world.test_world import TRAFFIC
from vnetdp import (
    ConfigError,
    Driver,
    GuestMemory,
    MailboxEndpoint,
    NetDevice,
    Worker,
    WorkerProcess,
    World,
    memory_for,
)
from vnetdp.system.poll import readable


def forked(work: Callable[[], Any]) -> Any:
    """Return what *work* returns in a forked child; or its ConfigError, as text."""

    def run(to: Connection) -> None:
        try:
            to.send(work())
        except ConfigError as e:
            to.send(str(e))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(there,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
        process.start()
    there.close()
    with here:
        assert here.poll(PATIENCE)
        came = here.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0
    return came


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_is_a_checkpoint(kind: str) -> None:
    with no_descriptor_leaks(), Bed(kind, private=True) as bed:
        bed.do(TRAFFIC)

        def go_on() -> Any:
            bed.world.adopt()
            came = bed.do(TRAFFIC * 3)
            saved = bed.world.save()
            bed.__exit__()
            return came, saved

        saved = bed.world.save()
        child = forked(go_on)
        assert bed.world.save() == saved
        assert (bed.do(TRAFFIC * 3), bed.world.save()) == child


def test_a_child_goes_on_from_a_world_that_its_parent_loaded() -> None:
    with Bed("lossy", private=True) as bed, Bed("lossy") as other:
        other.do(TRAFFIC)
        bed.world.load(other.world.save())

        def go_on() -> Any:
            bed.world.adopt()
            return bed.do(TRAFFIC), bed.world.save()

        assert forked(go_on) == (other.do(TRAFFIC), other.world.save())


def test_a_childs_notifications_are_its_own() -> None:
    with (
        memory_for(num=4, private=True) as memory,
        MailboxEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=4) as guest,
    ):
        world = World(guest)
        guest.fileno()  # the parent has it made

        def go_on() -> Any:
            world.adopt()
            wire.put(bytes(60))
            device.step()
            guest.step()
            return readable(guest, 0), guest.receive()

        assert forked(go_on) == (True, [bytes(60)])
        assert not readable(guest, 0)


def test_a_world_in_shared_memory_is_not_adopted() -> None:
    with Bed("mailbox") as bed:
        assert "memory 0: parent and child share it: make it with memory_for(private=True)" in forked(bed.world.adopt)
        assert "call adopt first in its forked child" in forked(bed.world.save)


def test_a_world_with_a_thread_is_not_adopted() -> None:
    with (
        memory_for(num=4, private=True) as memory,
        MailboxEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=4) as guest,
    ):
        world = World(guest)
        guest.start()
        assert "driver 0: it runs in a thread" in forked(world.adopt)
        guest.stop()
        world.adopt()  # in the process that made it: nothing
        assert forked(world.adopt) is None


def test_private_memory_is_for_this_process_alone() -> None:
    with (
        memory_for(num=4, private=True) as memory,
        MailboxEndpoint() as wire,
        WorkerProcess(1) as worker,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory, num=4),
    ):
        assert device.owner.value == "userspace"
        assert "set_memory: EBADF: the guest memory is private" in str(device.last_error)
        with pytest.raises(ConfigError, match="regions of private memory have no descriptor"):
            GuestMemory(memory.regions)


def test_a_worker_in_a_thread_takes_private_memory() -> None:
    with (
        memory_for(num=4, private=True) as memory,
        MailboxEndpoint() as wire,
        Worker(1) as worker,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory, num=4),
    ):
        assert device.owner.value == "vhost"
        assert memory.regions[0].fd == -1
