"""`drive`: a guest's driver against any vhost-user back end, generating, checking, and coming back after a crash."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from vnetdp_kernels import layout

from . import clock
from .backends.vhost_user import NetConfig, VhostUserFrontEnd
from .device import NetDevice
from .driver import Driver, memory_for
from .endpoints.base import Endpoint, frame_len
from .endpoints.loopback import GenerateEndpoint, NullEndpoint
from .errors import ConfigError
from .owners import Owner
from .state import VIRTIO_NET_S_LINK_UP, Control
from .watch import Watch

_TICK_S = 0.02
_ANSWER_S = 1.0  # after which it is said what is waited for
_QUIET_S = 0.5  # nothing moved for so long: nothing more will
_LOSS_S = 3.0  # the same while numbered frames are missing
_SETTLE_S = 3.0  # for what is on its way when the time is up


def drive(
    endpoint: Endpoint,
    path: str,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    *,
    listen: bool = False,
    queue_pairs: int = 1,
    num: int = 256,
    features: int | None = None,
    mtu: int = 1500,
    wait_s: float = 30.0,
    seconds: float | None = None,
    poll_us: int = 0,
    at_work: Callable[[Callable[[], dict[str, Any]]], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, Any]:
    """Run *endpoint* as a guest of the back end on *path*, until *stop*, *seconds*, or its last frame came back.

    mtu: of what the other side sends, if it does not say so itself; a receive buffer holds a frame of that size even if
    buffers can't be merged. at_work: a context for the time in which frames move, given a function that returns the report.
    Returns the report: tx_packets (guest to back end), rx_packets (back), bad_packets (corrupt, repeated or foreign),
    seconds from the first frame received to the last, mpps (received in these), and with a generator the ledger of what
    came back.
    """
    with ExitStack() as stack:
        front_end = VhostUserFrontEnd(path, queue_pairs, listen=listen, queue_size=num, watched=True)
        stack.callback(front_end.close)
        until = time.monotonic() + wait_s
        _wait(front_end, wait_s, stop, say)
        memory = stack.enter_context(memory_for(queue_pairs, num))
        nowhere = stack.enter_context(NullEndpoint(queue_pairs))
        config = front_end.config or NetConfig(Control.mac, VIRTIO_NET_S_LINK_UP, queue_pairs, 0)
        mtu = max(mtu, config.mtu)
        offered = front_end.features if features is None else front_end.features & features
        device = NetDevice(
            memory, nowhere, queue_pairs=queue_pairs, offered=offered, vhost=front_end.backends, max_num=num,
            fallback=False, mac=config.mac, mtu=config.mtu or None,
        )  # fmt: skip
        stack.callback(device.close)
        driver = Driver(device, memory, endpoint, queue_pairs=queue_pairs, num=num, frame_len=frame_len(mtu))
        stack.callback(driver.close)
        if device.last_error is not None and front_end.connected:
            raise ConfigError(f"{path}: {device.last_error}")
        stack.enter_context(Watch(front_end, device))
        _wait_for_owner(device, path, until, stop)
        say(f"driving {path}: {queue_pairs} queue pair{'s' * (queue_pairs > 1)} of {num}")
        driver.start(poll_us)
        received = clock.FrameClock()

        def report() -> dict[str, Any]:
            return _report(endpoint, driver, received, front_end.connections)

        with at_work(report):
            _run(front_end, driver, received, stop, math.inf if seconds is None else time.monotonic() + seconds)
        return report()


def _wait(front_end: VhostUserFrontEnd, wait_s: float, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Connect, again and again, and say what is waited for; ConfigError when the time is up, or waiting is in vain."""
    began = asked = time.monotonic()
    until = began + wait_s
    said = ""

    def stop_or_say() -> bool:
        nonlocal said
        since = asked if front_end.silent else began
        if time.monotonic() - since > _ANSWER_S and front_end.trouble not in ("", said):
            said = front_end.trouble
            say(f"{front_end.path}: {said}; waiting")
        return stop()

    while not stop_or_say():
        asked = time.monotonic()
        if front_end.connect(max(until - asked, _TICK_S), stop_or_say):
            return
        if time.monotonic() >= until:
            step = "" if front_end.silent else f": start one: vnetdp serve macswap --socket {front_end.path}"
            raise ConfigError(f"{front_end.path}: no back end within {wait_s:g} s: {front_end.trouble}{step}")
        time.sleep(_TICK_S)
    raise ConfigError(f"ended before a back end was on {front_end.path}")


def _wait_for_owner(device: NetDevice, path: str, until: float, stop: Callable[[], bool]) -> None:
    """Wait until a back end has the rings: one that died over them may be followed by another. ConfigError if none is."""
    while device.owner is not Owner.VHOST:
        if stop() or time.monotonic() >= until:
            raise ConfigError(f"{path}: {device.last_error}")
        time.sleep(_TICK_S)


def _run(
    front_end: VhostUserFrontEnd, driver: Driver, received: clock.FrameClock, stop: Callable[[], bool], until: float
) -> None:
    """Watch over the driver until the work is done; *received* looks at the frames received.

    Once it has to end, nothing more is sent, and what is on its way is waited for; not for ever, as a back end may have its
    own to send. A back end that dies is waited for, too.
    """
    generator = _generator(driver.endpoint)
    quiet_since = received.looked
    moved = 0
    settled = math.inf
    while received.looked < settled:
        time.sleep(clock.LOOK_S)
        driver.check()
        packets = driver.dvqs[:, layout.DVQ_PACKETS].copy()
        received.look(int(packets[0::2].sum()))
        looked = received.looked
        if packets.sum() != moved or not front_end.connected:
            moved, quiet_since = int(packets.sum()), looked
        if settled == math.inf and (stop() or looked >= until):
            settled = looked + _SETTLE_S
            if generator is not None:
                generator.stop()
        missing = generator is not None and generator.ledger_against(generator).lost > 0
        if (driver.endpoint.finished or settled < math.inf) and looked - quiet_since > (
            _LOSS_S if missing else _QUIET_S
        ):
            break


def _generator(endpoint: Endpoint) -> GenerateEndpoint | None:
    """Return what makes numbered frames in *endpoint*, be it behind faults."""
    return endpoint.innermost if isinstance(endpoint.innermost, GenerateEndpoint) else None


def _report(endpoint: Endpoint, driver: Driver, took: clock.FrameClock, connections: int) -> dict[str, Any]:
    queues = driver.counters()
    received = sum(queue["packets"] for queue in queues[0::2])
    report: dict[str, Any] = {
        "tx_packets": sum(queue["packets"] for queue in queues[1::2]),
        "rx_packets": received,
        "bad_packets": 0,
        "mpps": took.mpps(received),
        "seconds": took.seconds,
        "connections": connections,
        "endpoint": endpoint.counters(),
    }
    generator = _generator(endpoint)
    if generator is not None:
        ledger = generator.ledger_against(generator)
        foreign = int(generator.ledger[:, layout.LEDGER_FOREIGN].sum())
        report["ledger"] = ledger.as_dict()
        report["bad_packets"] = ledger.corrupted + ledger.duplicated + foreign
    return report
