"""`settle` moves the frames that steps move: of many devices in one call, under each owner of the rings."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from tests.support.by_hand import COMPILED, no_descriptor_leaks
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.clock import Clock
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.frames import FrameEndpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import ConfigError, GuestError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.stepping import settle
from vnetdp.world.world import World
from vnetdp_kernels import rows as r

NUM = 16


def frame(number: int, length: int = 64) -> bytes:
    return b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + b"\x88\xb5" + number.to_bytes(length - 14, "big")


class Host:
    """A guest with its device."""

    def __init__(
        self, stack: ExitStack, wire: Endpoint, guest: Endpoint | None = None, vhost: Datapath | None = None
    ) -> None:
        self.memory = stack.enter_context(memory_for(num=NUM))
        self.wire = wire
        backends = None if vhost is None else [UserspaceBackend(vhost, 0)]
        self.device = stack.enter_context(NetDevice(self.memory, wire, vhost=backends, threaded=False))
        self.guest = stack.enter_context(Driver(self.device, self.memory, guest, num=NUM))


@pytest.mark.parametrize("frames", [1, 7, 200])
def test_frames_of_mailboxes_arrive_both_ways_in_one_call(frames: int) -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        wires = [stack.enter_context(MailboxEndpoint()) for _ in range(3)]
        hosts = [Host(stack, wire) for wire in wires]
        for host, wire in zip(hosts, wires, strict=True):
            for n in range(frames):
                host.guest.send(frame(n))
                wire.put(frame(n, 1000))
        assert settle(*(host.guest for host in hosts)) == 3 * 4 * frames
        for host, wire in zip(hosts, wires, strict=True):
            assert wire.take() == [frame(n) for n in range(frames)]
            assert host.guest.receive() == [frame(n, 1000) for n in range(frames)]
        assert settle(*(host.guest for host in hosts)) == 0
        assert settle() == 0


def test_it_leaves_the_memory_that_steps_leave() -> None:
    with ExitStack() as stack:
        settled, stepped = (
            Host(stack, stack.enter_context(EchoEndpoint()), stack.enter_context(GenerateEndpoint(size=100, count=50)))
            for _ in range(2)
        )
        moved = settle(settled.guest)
        by_steps = 0
        while n := stepped.guest.step() + stepped.device.step():
            by_steps += n
        assert moved == by_steps == 3 * 50
        assert (settled.memory.mem == stepped.memory.mem).all()
        assert settled.device.counters() == stepped.device.counters()


def test_a_frame_that_an_endpoint_in_python_passes_on_to_another_device_moves_too() -> None:
    with ExitStack() as stack:
        boxes: list[MailboxEndpoint] = []

        class Hub(FrameEndpoint):
            def frame_received(self, frame: bytes, queue: int) -> bytes | None:
                return None if boxes[0].put(frame) else frame

        boxes.append(stack.enter_context(MailboxEndpoint()))
        # The device that the frames go to comes first, and has been served when they come.
        target, source = Host(stack, boxes[0]), Host(stack, stack.enter_context(Hub()))
        source.guest.send(frame(1))
        assert settle(target.guest, source.guest) == 4
        assert target.guest.receive() == [frame(1)]


@pytest.mark.parametrize("at_once", [4095, 4096, 9000] if COMPILED else [200])
def test_more_frames_than_kernels_move_at_once(at_once: int) -> None:
    with ExitStack() as stack:
        guest = stack.enter_context(GenerateEndpoint(count=at_once))
        host = Host(stack, stack.enter_context(EchoEndpoint()), guest)
        assert settle(host.guest) == 3 * at_once


def test_the_owner_of_the_rings_steps_whichever_it_is() -> None:
    with ExitStack() as stack:
        vhost = stack.enter_context(Datapath(1))
        box = stack.enter_context(MailboxEndpoint())
        host = Host(stack, box, vhost=vhost)
        for n, owner in enumerate((Owner.VHOST, Owner.USERSPACE, Owner.VHOST)):
            host.device.set_use_vhost(owner is Owner.VHOST)
            assert host.device.owner is owner
            host.guest.send(frame(n))
            assert settle(host.guest) == 2
            assert box.take() == [frame(n)]
        host.device.set_link(False)  # nobody has them
        host.guest.send(frame(9))
        settle(host.guest)
        assert box.take() == []


def test_a_delay_passes_by_the_clock_that_was_handed_in() -> None:
    clock = Clock()
    with (
        memory_for(num=NUM) as memory,
        MailboxEndpoint() as box,
        FaultEndpoint(box, delay_ms=10) as wire,
        NetDevice(memory, wire, clock=clock, threaded=False) as device,
        Driver(device, memory, num=NUM) as guest,
    ):
        guest.send(frame(1))
        settle(guest)
        assert box.take() == []
        clock.advance_to(10_000_000)
        settle(guest)
        assert box.take() == [frame(1)]


def test_an_endpoint_that_takes_no_frames_leaves_them_in_the_ring() -> None:
    class Full(MailboxEndpoint):
        full = True

        def takes_frames(self, queue: int) -> bool:
            return not self.full

    with ExitStack() as stack:
        box = stack.enter_context(Full())
        host = Host(stack, box)
        for n in range(100):
            host.guest.send(frame(n))
        settle(host.guest)
        assert box.take() == []
        box.full = False
        settle(host.guest)
        assert box.take() == [frame(n) for n in range(100)]


def test_memory_that_was_closed_is_an_error_and_unmapped() -> None:
    with ExitStack() as stack:
        host = Host(stack, stack.enter_context(EchoEndpoint()))
        settle(host.guest)
        address = host.memory.mem.ctypes.data
        host.memory.close()
        with pytest.raises(ConfigError, match="the guest memory is closed"):
            settle(host.guest)
        host.guest.close()
        host.device.close()
        with open("/proc/self/maps") as maps:
            assert not any(line.startswith(f"{address:x}-") for line in maps)


def test_a_device_that_breaks_the_specification_is_told_of() -> None:
    with ExitStack() as stack:
        box = stack.enter_context(MailboxEndpoint())
        host = Host(stack, box)
        settle(host.guest)
        used = host.guest.dvqs[0, r.DVQ_USED]
        host.memory.mem[used + 2] = 200  # used.idx, of the receiveq
        with pytest.raises(GuestError):
            settle(host.guest)


def test_a_guest_that_breaks_the_specification_gets_needs_reset() -> None:
    with ExitStack() as stack:
        host = Host(stack, stack.enter_context(MailboxEndpoint()))
        avail = host.guest.dvqs[1, r.DVQ_AVAIL]
        host.memory.mem[avail + 2] = 200  # avail.idx, of the transmitq
        settle(host.guest)
        assert len(host.device.ring_errors()) == 1
        assert host.device.status & 0x40


def test_what_has_a_thread_is_refused() -> None:
    with ExitStack() as stack:
        host = Host(stack, stack.enter_context(EchoEndpoint()))
        host.guest.start()
        with pytest.raises(ConfigError, match="call stop before step"):
            settle(host.guest)
        host.guest.stop()
        memory: GuestMemory = stack.enter_context(memory_for(num=NUM))
        device = stack.enter_context(NetDevice(memory, stack.enter_context(EchoEndpoint())))
        with pytest.raises(ConfigError, match="make it with threaded=False to step it"):
            settle(stack.enter_context(Driver(device, memory, num=NUM)))
        memory = stack.enter_context(memory_for(num=NUM))
        worker = stack.enter_context(Worker(1))
        wire = stack.enter_context(EchoEndpoint())
        device = stack.enter_context(NetDevice(memory, wire, vhost=worker, threaded=False))
        with pytest.raises(ConfigError, match="the device's worker runs by itself"):
            settle(stack.enter_context(Driver(device, memory, num=NUM)))


def test_a_world_that_was_loaded_settles_as_before() -> None:
    with ExitStack() as stack:
        box = stack.enter_context(MailboxEndpoint())
        host = Host(stack, box, vhost=stack.enter_context(Datapath(1)))
        world = World(host.guest)
        saved = world.save()
        runs = []
        for _ in range(2):
            host.guest.send(frame(1))
            settle(host.guest)
            host.device.set_use_vhost(False)
            box.put(frame(2))
            settle(host.guest)
            runs.append((box.take(), host.guest.receive(), world.save()))
            world.load(saved)
        assert runs[0] == runs[1]
        assert runs[0][:2] == ([frame(1)], [frame(2)])


def test_a_forked_child_settles_its_copy_of_a_world() -> None:
    with ExitStack() as stack:
        box = stack.enter_context(MailboxEndpoint())
        memory = stack.enter_context(memory_for(num=NUM, private=True))
        device = stack.enter_context(NetDevice(memory, box, threaded=False))
        guest = stack.enter_context(Driver(device, memory, num=NUM))
        world = World(guest)
        guest.send(frame(1))
        child = os.fork()
        if child == 0:
            try:
                world.adopt()
                settle(guest)
                os._exit(0 if box.take() == [frame(1)] else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert box.take() == []
        settle(guest)
        assert box.take() == [frame(1)]


def test_a_forked_child_is_refused() -> None:
    with ExitStack() as stack:
        host = Host(stack, stack.enter_context(EchoEndpoint()))
        child = os.fork()
        if child == 0:
            try:
                settle(host.guest)
            except ConfigError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
