"""`drive`: a guest's driver against any vhost-user back end, generating, checking, and coming back after a crash."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from vnetdp_kernels import rows as r

from ..device.device import NetDevice
from ..device.owners import Owner
from ..endpoints.base import Endpoint, frame_len
from ..endpoints.loopback import GenerateEndpoint, NullEndpoint
from ..errors import BackendError, ConfigError, GuestError, UnbindError
from ..guest.driver import Driver, memory_for
from ..vhost_user.front_end.front_end import NetConfig, VhostUserFrontEnd
from ..vhost_user.front_end.watch import Watch
from ..virtio.state import VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_NET_S_LINK_UP, Control
from . import clock

_TICK_S = 0.02
_ANSWER_S = 1.0  # after which the reason of a wait is said
_QUIET_S = 0.5  # nothing moved for so long: nothing more will
_LOSS_S = 3.0  # the same while numbered frames are missing
_SETTLE_S = 3.0  # for frames on their way when the time is up


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

    mtu: the MTU in bytes, if the back end's configuration space has no larger one; a receive buffer holds a frame of that
    size even if buffers can't be merged. at_work: a context for the time in which frames move, given a function that
    returns the report. wait_s: seconds to wait for a back end, at first and after each loss of its connection.

    Returns the report: tx_packets (guest to back end), rx_packets (back), bad_packets (corrupt, repeated or foreign),
    seconds from the first frame received to the last, mpps (received in these), errors, and with a generator the ledger of
    what came back, if that answers what was sent: something did, or a count was asked for, and the back end sends no
    numbered frames of its own.
    """
    with ExitStack() as stack:
        front_end = VhostUserFrontEnd(path, queue_pairs, listen=listen, queue_size=num, watched=True)
        stack.callback(front_end.close)
        wait = _Wait(front_end, wait_s, say)
        _connect(front_end, wait, stop)
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
            raise ConfigError(_not_taken(path, device.last_error))
        run = _Run(front_end, device, driver, wait_s, say)
        stack.enter_context(Watch(front_end, device, run.moved))
        _wait_for_owner(device, path, wait, stop)
        say(f"driving {path}: {queue_pairs} queue pair{'s' * (queue_pairs > 1)} of {num}")
        driver.start(poll_us)
        with at_work(run.report):
            run.run(stop, math.inf if seconds is None else time.monotonic() + seconds)
        return run.report()


class _Wait:
    """A wait for a back end, of at most *wait_s* seconds from now on, which says its reason."""

    def __init__(self, front_end: VhostUserFrontEnd, wait_s: float, say: Callable[[str], None]) -> None:
        self._front_end, self._wait_s, self._say = front_end, wait_s, say
        self._began = time.monotonic()
        self._silent_since: float | None = None
        self._said = ""
        self.until = self._began + wait_s

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def look(self) -> None:
        """Say why there is no back end, once that has lasted for a second."""
        trouble, now = self._front_end.trouble, time.monotonic()
        self._silent_since = (self._silent_since or now) if self._front_end.silent else None
        if now - (self._silent_since or self._began) > _ANSWER_S and trouble not in ("", self._said):
            self._said = trouble
            self._say(f"{self._front_end.path}: {trouble}; waiting")

    def in_vain(self, what: str) -> str:
        """Return the error once the wait is over: *what* did not come, why, and the next step."""
        front_end = self._front_end
        way = "--connect " if front_end.listening else ""
        other = "end it, and start another" if front_end.hung else "start one"
        step = f"{other}: vnetdp serve macswap {way}--socket {front_end.path}"
        if front_end.silent:
            step = "end that front end, or restart the back end"
        return f"{front_end.path}: {what} within {self._wait_s:g} s: {front_end.trouble}: {step}"


def _connect(front_end: VhostUserFrontEnd, wait: _Wait, stop: Callable[[], bool]) -> None:
    """Connect, again and again; ConfigError when the time is up, or waiting is in vain."""

    def stop_or_say() -> bool:
        wait.look()
        return stop()

    while not stop_or_say():
        try:
            if front_end.connect(max(wait.until - time.monotonic(), _TICK_S), stop_or_say):
                return
        except BackendError as e:
            raise ConfigError(f"{front_end.path}: the back end can't be used: {e}: end it, and start another") from e
        if wait.over:
            raise ConfigError(wait.in_vain("no back end"))
        time.sleep(_TICK_S)
    raise ConfigError(f"{front_end.path}: ended before a back end was connected")


def _wait_for_owner(device: NetDevice, path: str, wait: _Wait, stop: Callable[[], bool]) -> None:
    """Wait until a back end has the rings: another may follow a back end that died. ConfigError if none gets them."""
    while device.owner is not Owner.VHOST:
        if stop() or wait.over:
            raise ConfigError(_not_taken(path, device.last_error))
        time.sleep(_TICK_S)


def _not_taken(path: str, error: Exception | None) -> str:
    """Return why no back end has the rings, after *error*, and the next step."""
    if error is None:
        return f"{path}: ended before a back end took the rings"
    if isinstance(error, UnbindError):
        return error.detail
    return f"{path}: the back end did not take the rings: {error}: end it, and start another"


class _Run:
    """The driver at work: watched over until the work is done, or can't be. errors: why it can't, each said once."""

    def __init__(
        self, front_end: VhostUserFrontEnd, device: NetDevice, driver: Driver, wait_s: float, say: Callable[[str], None]
    ) -> None:
        self._front_end, self._device, self._driver = front_end, device, driver
        self._wait_s, self._say = wait_s, say
        self._wait: _Wait | None = None
        self._connections = front_end.connections
        self._generator = _generator(driver.endpoint)
        self._strange = False  # numbered frames came that the generator had not made: they answer none of its own
        self._received = clock.FrameClock()
        self.errors: list[str] = []

    def moved(self) -> int:
        return int(self._driver.dvqs[:, r.DVQ_PACKETS].sum())

    def run(self, stop: Callable[[], bool], until: float) -> None:
        """Return once the work is done, or has to end: *stop* or *until* says so, or an error.

        Nothing more is sent then, and frames on their way are waited for; not for ever, as a back end may send its own.
        """
        endpoint, generator, received = self._driver.endpoint, self._generator, self._received
        quiet_since = received.looked
        moved = 0
        settled = math.inf
        waits = False  # for a back end, with frames still to move
        while received.looked < settled and not endpoint.gone and self._works():
            time.sleep(clock.LOOK_S)
            packets = self._driver.dvqs[:, r.DVQ_PACKETS].copy()
            received.look(int(packets[0::2].sum()))
            looked = received.looked
            missing = generator is not None and generator.ledger_against(generator).lost > 0
            waits = self._wait is not None and (missing or generator is None or not endpoint.finished)
            if packets.sum() != moved or waits:
                moved, quiet_since = int(packets.sum()), looked
            if settled == math.inf and (stop() or looked >= until):
                settled = looked + _SETTLE_S
                if generator is not None:
                    with self._driver.paused():  # or it makes one more, counted after all were seen to have arrived
                        generator.stop()
            if (endpoint.finished or settled < math.inf) and looked - quiet_since > (_LOSS_S if missing else _QUIET_S):
                break
        self._device.set_running(False)
        error = self._device.owner_error
        if not self.errors and self._device.fenced and isinstance(error, UnbindError):
            self.errors.append(error.detail)  # the device has said it
        elif not self.errors and waits:
            self.errors.append(f"{self._front_end.path}: no back end was connected at the end")  # since when was said

    def _works(self) -> bool:
        """Look after the back end, the rings and the ledger; False, and `errors` says why, if there is no going on."""
        if self._generator is not None:
            ahead = self._generator.ledger[:, r.LEDGER_NEXT].copy()
            self._strange = self._strange or bool((ahead > self._generator.rows[:, r.EP_SEQ]).any())
        error = ""
        try:
            self._driver.check()
        except GuestError as e:
            error = f"{self._front_end.path}: the back end broke {e}"
        if self._device.status & VIRTIO_CONFIG_S_NEEDS_RESET:
            error = f"{self._front_end.path}: the back end reports a broken ring: restart the back end, then drive"
        error = error or self._follow()
        if error:
            self.errors.append(error)
            self._say(f"vnetdp: {error}")
        return not error

    def _follow(self) -> str:
        """Wait for the next back end if there is none any more; return why there is none once that took too long."""
        front_end, device, wait = self._front_end, self._device, self._wait
        if front_end.connected and (device.owner is Owner.VHOST or not device.ready):
            if front_end.connections != self._connections:
                self._wait = None
                self._connections = front_end.connections
                self._say(f"driving {front_end.path} again, over connection {self._connections}")
        elif wait is None and front_end.connected:
            pass  # it is being given the rings
        elif wait is None:
            why = "hangs" if front_end.hung else "is gone: its connection was lost"
            self._say(
                f"{front_end.path}: the back end {why}; waiting up to {self._wait_s:g} s for the next one on that socket"
            )
            self._wait = _Wait(front_end, self._wait_s, self._say)
        elif wait.over:
            return wait.in_vain("no back end came back")
        else:
            wait.look()
        return ""

    def report(self) -> dict[str, Any]:
        queues = self._driver.counters()
        received = sum(queue["packets"] for queue in queues[0::2])
        report: dict[str, Any] = {
            "tx_packets": sum(queue["packets"] for queue in queues[1::2]),
            "rx_packets": received,
            "bad_packets": 0,
            "mpps": self._received.mpps(received),
            "seconds": self._received.seconds,
            "connections": self._front_end.connections,
            "errors": [*self.errors, *self._driver.endpoint.failures],
            "endpoint": self._driver.endpoint.counters(),
        }
        generator = self._generator
        if generator is not None:
            ledger = generator.ledger_against(generator)
            report["bad_packets"] = ledger.corrupted + int(generator.ledger[:, r.LEDGER_FOREIGN].sum())
            # Frames count as lost only if any came back, or their number was given.
            if not self._strange and (ledger.delivered or generator.count >= 0):
                report["bad_packets"] += ledger.duplicated
                report["ledger"] = ledger.as_dict()
        return report


def _generator(endpoint: Endpoint) -> GenerateEndpoint | None:
    """Return the generator in *endpoint*, be it behind faults; None if there is none."""
    return endpoint.innermost if isinstance(endpoint.innermost, GenerateEndpoint) else None
