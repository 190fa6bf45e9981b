"""A stepped device costs a descriptor of guest memory and little else: thousands fit into one process."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks, wait_for
from tests.system.test_exhaustion import descriptors
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import MachineError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.system.poll import readable

DEVICES = 5000 if CAMPAIGN else 600
FRAME = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + b"\x88\xb5" + bytes(50)

_MANY = """
import resource, sys
from contextlib import ExitStack
from vnetdp import Driver, EchoEndpoint, NetDevice, memory_for
from vnetdp.errors import MachineError

hard, devices = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
frame = bytes.fromhex("02000000000102000000000288b5") + bytes(50)
with ExitStack() as stack:
    guests = []
    try:
        for _ in range(devices):
            memory = stack.enter_context(memory_for(num=16))
            wire = stack.enter_context(EchoEndpoint())
            device = stack.enter_context(NetDevice(memory, wire, threaded=False))
            guests.append((stack.enter_context(Driver(device, memory, num=16)), device))
    except MachineError as e:
        print(e)
        sys.exit(3)
    for guest, device in guests:
        guest.send(frame)
        guest.step(), device.step(), guest.step()
    print(sum(guest.receive() == [frame] for guest, _ in guests))
"""


def many(hard: int) -> subprocess.CompletedProcess[str]:
    """Run devices in a process that is allowed 256 descriptors, and *hard* if it asks for them."""
    command = [sys.executable, "-c", _MANY, str(hard), str(DEVICES)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_thousands_of_devices_fit_under_a_low_limit_of_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2 * DEVICES:
        pytest.skip(f"the hard limit of descriptors is {hard}")
    done = many(2 * DEVICES)
    assert (done.returncode, done.stdout.strip()) == (0, str(DEVICES)), done.stderr


def test_a_hard_limit_that_is_too_low_is_told_in_one_line() -> None:
    done = many(256)
    assert done.returncode == 3, done.stderr
    assert "of 256 descriptors are in use; raise the limit: ulimit -n 65536" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_stepped_device_and_its_driver_take_one_descriptor() -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        before = open_descriptors()
        memory = stack.enter_context(memory_for(num=16))
        wire = stack.enter_context(MailboxEndpoint())
        device = stack.enter_context(NetDevice(memory, wire, threaded=False))
        guest = stack.enter_context(Driver(device, memory, num=16))
        guest.send(FRAME)
        assert (guest.step(), device.step()) == (1, 1)
        assert wire.take() == [FRAME]
        assert open_descriptors() == before + 1


def test_a_descriptor_that_is_asked_for_late_is_signalled_from_then_on() -> None:
    with (
        memory_for(num=16) as memory,
        EchoEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=16) as guest,
    ):
        guest.send(FRAME)
        guest.step()
        kick, call = device.kicks[1], device.calls[0]
        assert readable(kick, 0), "a kick from before may have been meant"
        assert readable(call, 0)
        kick.clear()
        call.clear()
        assert not readable(kick, 0)
        assert device.step() == 1
        assert readable(call, 0)
        assert not readable(guest, 0)
        assert guest.step() == 1
        assert readable(guest, 0)
        assert guest.receive() == [FRAME]


def test_a_driver_of_a_stepped_device_may_get_a_thread() -> None:
    with (
        memory_for(num=16) as memory,
        EchoEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=16) as guest,
    ):
        for _ in range(2):
            guest.send(FRAME)
            guest.step()
            device.step()
        guest.start()
        guest.send(FRAME)
        wait_for(lambda: device.step() == 1, "the thread has sent")
        wait_for(lambda: guest.counters()[0]["packets"] == 3, "the thread was called")
        assert guest.receive() == 3 * [FRAME]


def test_an_endpoint_that_was_stepped_sleeps_with_a_worker() -> None:
    with (
        memory_for(num=16) as memory,
        MailboxEndpoint() as wire,
        Worker(1) as worker,
        NetDevice(memory, wire, vhost=worker, threaded=False) as device,
    ):
        device.set_use_vhost(False)
        with Driver(device, memory, num=16) as guest:
            wire.put(FRAME)
            assert device.step() == 1
            device.set_use_vhost(True)
            wire.put(FRAME)
            wait_for(lambda: guest.step() > 0 and guest.counters()[0]["packets"] == 2, "the worker was woken")
            assert guest.receive() == 2 * [FRAME]


def test_a_descriptor_that_can_not_be_had_later_leaves_the_device_as_it_was() -> None:
    with (
        memory_for(num=16) as memory,
        MailboxEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=16) as guest,
    ):
        for ask in (device.kicks[0].fileno, device.config_call.fileno, guest.fileno, guest.start):
            with no_descriptor_leaks(), descriptors(0), pytest.raises(MachineError, match="ulimit -n") as caught:
                ask()
            assert caught.value.errno == errno.EMFILE
        guest.send(FRAME)
        assert (guest.step(), device.step()) == (1, 1)
        assert wire.take() == [FRAME]
