"""`drive`: a guest's driver against any vhost-user back end, generating, checking, and coming back after a crash."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vnetdp_kernels import layout

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
_QUIET_S = 0.5  # nothing came for so long: nothing more will
_SETTLE_S = 3.0  # for what is on its way in the end


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
) -> dict[str, Any]:
    """Run *endpoint* as a guest of the back end on *path*, until *stop*, *seconds*, or its last frame came back.

    mtu: of what the other side sends, if it does not say so itself; a receive buffer holds a frame of that size even if
    buffers can't be merged.
    Returns the report: tx_packets (guest to back end), rx_packets (back), bad_packets (corrupt, repeated or foreign), mpps
    (received), and with a generator the ledger of what came back.
    """
    with ExitStack() as stack:
        front_end = VhostUserFrontEnd(path, queue_pairs, listen=listen, queue_size=num, watched=True)
        stack.callback(front_end.close)
        until = time.monotonic() + wait_s
        _wait(front_end, wait_s, stop)
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
        say(f"driving {path}: {queue_pairs} queue pairs of {num}")
        driver.start(poll_us)
        began = time.monotonic()
        took = _run(front_end, driver, stop, None if seconds is None else began + seconds) - began
        _settle(endpoint, driver)
        return _report(endpoint, driver, took, front_end.connections)


def _wait(front_end: VhostUserFrontEnd, wait_s: float, stop: Callable[[], bool]) -> None:
    """Connect, again and again; ConfigError when the time is up."""
    until = time.monotonic() + wait_s
    while not stop():
        if front_end.connect(max(until - time.monotonic(), _TICK_S), stop):
            return
        if time.monotonic() >= until:
            raise ConfigError(f"no vhost-user back end on {front_end.path} within {wait_s:g} s")
        time.sleep(_TICK_S)
    raise ConfigError(f"ended before a back end was on {front_end.path}")


def _wait_for_owner(device: NetDevice, path: str, until: float, stop: Callable[[], bool]) -> None:
    """Wait until a back end has the rings: one that died over them may be followed by another. ConfigError if none is."""
    while device.owner is not Owner.VHOST:
        if stop() or time.monotonic() >= until:
            raise ConfigError(f"{path}: {device.last_error}")
        time.sleep(_TICK_S)


def _run(front_end: VhostUserFrontEnd, driver: Driver, stop: Callable[[], bool], until: float | None) -> float:
    """Watch over the driver until the work is done, and return when that was; a back end that dies is waited for."""
    last, quiet_since = -1, time.monotonic()
    while not stop() and (until is None or time.monotonic() < until):
        time.sleep(_TICK_S)
        driver.check()
        received = sum(queue["packets"] for queue in driver.counters())
        if received != last or not front_end.connected:
            last, quiet_since = received, time.monotonic()
        elif driver.endpoint.finished and time.monotonic() - quiet_since > _QUIET_S:
            return quiet_since
    return time.monotonic()


def _settle(endpoint: Endpoint, driver: Driver) -> None:
    """Send nothing more, and wait until nothing comes any more; not for ever, as a back end may have its own to send."""
    if isinstance(endpoint, GenerateEndpoint):
        endpoint.stop()
    last, until = -1, time.monotonic() + _SETTLE_S
    while (now := sum(queue["packets"] for queue in driver.counters())) != last and time.monotonic() < until:
        last = now
        time.sleep(0.1)


def _report(endpoint: Endpoint, driver: Driver, took: float, connections: int) -> dict[str, Any]:
    queues = driver.counters()
    received = sum(queue["packets"] for queue in queues[0::2])
    report: dict[str, Any] = {
        "tx_packets": sum(queue["packets"] for queue in queues[1::2]),
        "rx_packets": received,
        "bad_packets": 0,
        "mpps": received / took / 1e6,
        "seconds": took,
        "connections": connections,
        "endpoint": endpoint.counters(),
    }
    if isinstance(endpoint, GenerateEndpoint):
        ledger = endpoint.ledger_against(endpoint)
        foreign = int(endpoint.ledger[:, layout.LEDGER_FOREIGN].sum())
        report["ledger"] = ledger.as_dict()
        report["bad_packets"] = ledger.corrupted + ledger.duplicated + foreign
    return report
