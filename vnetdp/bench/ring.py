"""`vnetdp bench ring`: the cost of the rings, on one core and on two, under either owner."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.loops.alternate import alternate
from vnetdp_kernels.rows import Control

from ..backends.worker import Worker
from ..datapath.datapath import scratch_for
from ..device.device import NetDevice
from ..endpoints.base import Endpoint
from ..endpoints.loopback import EchoEndpoint, GenerateEndpoint, NullEndpoint, drained
from ..errors import VnetdpError
from ..guest.driver import Driver, memory_for
from ..shared.memory import DirtyLog
from ..warmup import warm_up
from .report import Row

SIZES = (64, 1500)
# Endpoints of the device's side: drop frames (rings only), make and check them (copied once), echo them (both queues).
ENDPOINTS: dict[str, Callable[[int], Endpoint]] = {
    "null": lambda _: NullEndpoint(),
    "generate": lambda size: GenerateEndpoint(size=size),
    "echo": lambda _: EchoEndpoint(),
}
_RING = 256
_HANDOVERS = 1000
_PATIENCE_S = 30.0  # for a core to give a thread time
_Say = Callable[[str], None]


class CountError(VnetdpError):
    """A benchmark's own packet counts do not add up: its figures mean nothing."""


def run(rounds: int = 5, seconds: float = 1.0, say: _Say = lambda _: None) -> list[Row]:
    """Run all measurements, *rounds* times in turn, medians; *seconds* for each of those on two cores.

    A measurement whose packet counts do not add up has a row with `failed`, the reason; the others stand.
    """
    warm_up(say)
    measurements: dict[str, Callable[[], list[Row]]] = {
        "device alone": lambda: one_core(rounds, say),
        "device alone, dirty log on": lambda: logging_cost(rounds, say),
        **{f"two cores, {size} bytes": partial(two_cores, size, rounds, seconds, say) for size in SIZES},
        "change of owner under load": lambda: [handovers(_HANDOVERS, say)],
    }
    results: list[Row] = []
    for name, measure in measurements.items():
        try:
            results += measure()
        except CountError as e:
            results.append({"name": name, "failed": str(e)})
    return results


# --- one core: driver and device in turns, the clock around the device ---


class OneCore:
    """A device and a driver that take turns in one thread."""

    def __init__(self, endpoint: Endpoint, size: int, ring: int = _RING, logged: bool = False) -> None:
        with ExitStack() as stack:
            self.endpoint = stack.enter_context(endpoint)
            self.guest = stack.enter_context(GenerateEndpoint(size=size))
            self.memory = stack.enter_context(memory_for(num=ring))
            self.device = stack.enter_context(NetDevice(self.memory, endpoint, threaded=False))
            self.driver = stack.enter_context(Driver(self.device, self.memory, self.guest, num=ring))
            self.log = DirtyLog(self.memory.end) if logged else None
            if self.log is not None:
                stack.callback(self.log.close)
                self.device.set_log(self.log)
            self._scratch = scratch_for(1)
            self._ctl = np.zeros(r.CTL_SLOTS, np.int64)
            self._clock = np.zeros(2, np.int64)
            self._stack = stack.pop_all()

    def alternate(self, rounds: int) -> tuple[int, int]:
        """Let device and driver take *rounds* turns; return (ns of the device, frames that it moved), checked."""
        before = sum(queue["packets"] for queue in self.device.counters())
        ns, frames = alternate(
            self.device.userspace.stepped.rings,
            self.endpoint.wire,
            self.driver.rings,
            self.guest.wire,
            Control(self._ctl, -1),
            self._scratch,
            self._clock,
            rounds,
        )
        e, g = self.endpoint, self.guest
        queues = self.device.counters()
        moved = sum(queue["packets"] for queue in queues) - before
        # An echoed frame goes through both queues, and counts as one frame.
        if frames == 0 or moved != frames * (2 if isinstance(e, EchoEndpoint) else 1):
            raise CountError(f"{e.name}: the loop moved {frames} frames, the queues counted {moved}")
        for end, other in ((g, e), (e, g)):
            if isinstance(end, GenerateEndpoint) and isinstance(other, GenerateEndpoint):
                ledger = end.ledger_against(other)
                if ledger.duplicated or ledger.reordered or ledger.corrupted:
                    raise CountError(f"{e.name}: {ledger}")
        return ns, frames

    def close(self) -> None:
        self._stack.close()


def _medians(contenders: dict[Any, OneCore], rounds: int, turns: int) -> dict[Any, float]:
    """Return ns a frame of each, the median of *rounds*, taken in turns."""
    samples: dict[Any, list[float]] = {key: [] for key in contenders}
    for contender in contenders.values():
        contender.alternate(50)
    for _ in range(rounds):
        for key, contender in contenders.items():
            ns, frames = contender.alternate(turns)
            samples[key].append(ns / frames)
    return {key: statistics.median(values) for key, values in samples.items()}


def one_core(rounds: int, say: _Say) -> list[Row]:
    """The device's side alone, with each of ENDPOINTS."""
    say("device side alone, driver and device in one thread ...")
    with ExitStack() as stack:
        contenders = {}
        for size in SIZES:
            for name, make in ENDPOINTS.items():
                contenders[name, size] = OneCore(make(size), size)
                stack.callback(contenders[name, size].close)
        medians = _medians(contenders, rounds, 2000)
    return [
        {
            "name": f"device alone, {name}",
            "size": size,
            "ns_per_packet": ns,
            "mpps": 1e3 / ns,
            "peer": None,
            "ratio": None,
        }
        for (name, size), ns in medians.items()
    ]


def logging_cost(rounds: int, say: _Say) -> list[Row]:
    """The device's side alone with the dirty log on, beside off; ratio: time with the log / without."""
    say("the same with the dirty log ...")
    rows = []
    for size in SIZES:
        with ExitStack() as stack:
            contenders = {}
            for logged in (False, True):
                contenders[logged] = OneCore(GenerateEndpoint(size=size), size, logged=logged)
                stack.callback(contenders[logged].close)
            ns = _medians(contenders, rounds, 2000)
        rows.append(
            {
                "name": "device alone, dirty log on",
                "size": size,
                "ns_per_packet": ns[True],
                "mpps": 1e3 / ns[True],
                "peer": "dirty log off",
                "ratio": ns[True] / ns[False],
            }
        )
    return rows


# --- two cores ---


@contextmanager
def _two_threads(endpoint: Endpoint, guest: GenerateEndpoint, poll_us: int = -1) -> Iterator[NetDevice]:
    """Run a device and a driver, each busy-polling on a core of its own if there are two."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        memory = stack.enter_context(memory_for(num=_RING))
        worker = Worker(1, poll_us)
        stack.callback(worker.close)
        device = stack.enter_context(NetDevice(memory, endpoint, vhost=worker.backends, poll_us=poll_us))
        driver = stack.enter_context(Driver(device, memory, guest, num=_RING))
        driver.start(poll_us)
        if len(cores) > 1:
            for thread in (worker.loop_thread.native_id, device.native_id):
                os.sched_setaffinity(thread, {cores[1]})
            os.sched_setaffinity(driver.native_id, {cores[0]})
        yield device


def two_cores(size: int, rounds: int, seconds: float, say: _Say) -> list[Row]:
    """Both directions at once, generated and checked at either end; mpps is each way, the slower of the two.

    The vhost row's ratio is to userspace, taken in turns on the same rings.
    """
    say(f"driver and device on two cores, {size} bytes, both directions at once ...")
    wire, guest = GenerateEndpoint(size=size), GenerateEndpoint(size=size)
    samples: dict[bool, list[float]] = {False: [], True: []}
    with wire, guest, _two_threads(wire, guest) as device:
        for _ in range(rounds):
            for vhost, rates in samples.items():
                device.set_use_vhost(vhost)
                time.sleep(0.05)
                rates.append(_each_way(device, seconds))
        ledger = drained(wire, guest)
    if not ledger.clean:
        raise CountError(str(ledger))
    userspace, vhost_rate = (statistics.median(samples[key]) for key in (False, True))
    if not (userspace and vhost_rate):
        raise CountError(f"the driver or the device got no CPU time for {_PATIENCE_S:g} s: end other programs")
    return [
        {
            "name": f"two cores, both ways, {name}",
            "size": size,
            "mpps": mpps,
            "ns_per_packet": 1e3 / mpps,
            "peer": "userspace" if ratio else None,
            "ratio": ratio,
        }
        for name, mpps, ratio in (("userspace", userspace, None), ("vhost", vhost_rate, vhost_rate / userspace))
    ]


def _each_way(device: NetDevice, seconds: float) -> float:
    """Return the million packets a second that went each way, the slower of the two.

    A sample takes *seconds*, and longer while none went one way: on a busy machine one of the two threads may get no core.
    """
    before = device.counters()
    began = time.perf_counter()
    while True:
        time.sleep(seconds)
        took = time.perf_counter() - began
        after = device.counters()
        packets = min(b["packets"] - a["packets"] for a, b in zip(before, after, strict=True))
        if packets or took > _PATIENCE_S:
            return packets / took / 1e6


def handovers(count: int, say: _Say) -> Row:
    """The time of a change of owner under load both ways, median of *count*."""
    say(f"{count} changes of owner under load ...")
    wire, guest = GenerateEndpoint(size=64), GenerateEndpoint(size=64)
    with wire, guest, _two_threads(wire, guest, poll_us=0) as device:
        time.sleep(0.1)
        device.handovers_ns.clear()
        for turn in range(count):
            device.set_use_vhost(bool(turn % 2))
            time.sleep(0.001)
        ledger = drained(wire, guest)
        times = list(device.handovers_ns)
    if len(times) < count - 1 or not ledger.clean:
        raise CountError(f"{len(times)} changes of owner, {ledger}")
    return {
        "name": "change of owner under load",
        "size": 64,
        "us": statistics.median(times) / 1e3,
        "p99_us": sorted(times)[len(times) * 99 // 100] / 1e3,
        "peer": None,
        "ratio": None,
    }
