"""`vnetdp bench peers`: DPDK's own driver on our back end and on DPDK's, in turns in one run.

The driver is testpmd's virtio_user, the back ends are `vnetdp serve macswap --poll` and testpmd's net_vhost. All three
send back every packet with the addresses exchanged, so the packets that testpmd puts in circulation once go
round for ever. They are fewer than a ring holds, so that none is ever dropped for want of room: a back end may give a
packet back on one ring before it says on the other that it has taken it. The driver has one core and the back end the
other; the figures count packets that came back to the driver.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..errors import VnetdpError
from .dpdk import Dpdk, why_no_dpdk
from .report import Row

VNETDP = "vnetdp serve"
DPDK = "DPDK net_vhost"

_SIZES = (64, 1500)
_RING = 256
_BURST = 32  # packets testpmd moves at once
_BURSTS = 6  # in circulation
_START_S = 60.0  # until a back end listens: Numba may compile
_WARM_S = 0.3
_Say = Callable[[str], None]


class PeersBenchError(VnetdpError):
    """A contender didn't do its work."""


def run(rounds: int = 5, seconds: float = 2.0, say: _Say = lambda _: None) -> list[Row]:
    """Measure both back ends in *rounds* pairs of runs, *seconds* each, every second pair the other way round.

    Two rows a size: medians in `mpps`. The ratio of ours, vnetdp / DPDK, is the median of the pairs'.
    """
    cores = sorted(os.sched_getaffinity(0))
    missing = why_no_dpdk() or ("driver and back end need a core each" if len(cores) < 2 else None)
    if missing is not None:
        return [{"name": "virtio_user round trip", "peer": DPDK, "skipped": missing}]
    rows: list[Row] = []
    for size in _SIZES:
        samples: dict[str, list[float]] = {name: [] for name in BACK_ENDS}
        for number in range(rounds):
            for name in BACK_ENDS if number % 2 == 0 else reversed(BACK_ENDS):
                mpps = _measure(name, size, seconds, cores[0], cores[1])
                samples[name].append(mpps)
                load = os.getloadavg()[0]
                say(f"{size} bytes, round {number + 1}/{rounds}, {name}: {mpps:.3f} million/s (load {load:.1f})")
        ratio = statistics.median(ours / theirs for ours, theirs in zip(samples[VNETDP], samples[DPDK], strict=True))
        for name, values in samples.items():
            mpps = statistics.median(values)
            ours = name == VNETDP
            rows.append(
                {
                    "name": f"virtio_user on {name}",
                    "size": size,
                    "mpps": mpps,
                    "ns_per_packet": 1e3 / mpps,
                    "samples": values,
                    "peer": DPDK if ours else None,
                    "ratio": ratio if ours else None,
                }
            )
    return rows


def _measure(name: str, size: int, seconds: float, driver_core: int, back_end_core: int) -> float:
    """Return the million packets a second that came back to the driver."""
    with tempfile.TemporaryDirectory(prefix="vnetdp-bench-") as folder:
        scratch = Path(folder)
        socket = scratch / "s"
        with (
            BACK_ENDS[name](socket, scratch, back_end_core),
            Dpdk(
                [f"net_virtio_user0,path={socket},queue_size={_RING}"], scratch, [str(driver_core)],
                args=["--forward-mode=macswap", f"--burst={_BURST}", f"--txpkts={size}"],
            ) as driver,
        ):  # fmt: skip
            driver.wait()
            driver.ask(f"start tx_first {_BURSTS}")
            time.sleep(_WARM_S)
            driver.figures(0)
            time.sleep(seconds)
            figures = driver.figures(0)
            lost = int(driver.ask("stop").split("TX-dropped:")[1].split()[0])
    if lost or not figures["Rx-pps"]:
        raise PeersBenchError(f"{name}: {figures['Rx-pps']} packets/s, and the driver dropped {lost}")
    return figures["Rx-pps"] / 1e6


@contextmanager
def _vnetdp(socket: Path, scratch: Path, core: int) -> Iterator[None]:
    argv = [sys.executable, "-m", "vnetdp", "serve", "macswap", "--socket", str(socket), "--poll"]
    with open(scratch / "log", "wb") as log:
        server = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )
    try:
        _wait_for(socket, lambda: server.poll() is None, scratch / "log")
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def _dpdk(socket: Path, scratch: Path, core: int) -> Iterator[None]:
    args = ["--forward-mode=macswap", f"--burst={_BURST}", "--disable-link-check"]
    with Dpdk([f"net_vhost0,iface={socket},queues=1"], scratch, [str(core)], args=args) as testpmd:
        testpmd.wait()
        testpmd.ask("start")
        yield


def _wait_for(socket: Path, alive: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + _START_S
    while not socket.exists():
        if not alive() or time.monotonic() > until:
            raise PeersBenchError(f"the back end does not listen; it printed: {log.read_text()[-4000:]}")
        time.sleep(0.02)


BACK_ENDS: dict[str, Callable[[Path, Path, int], AbstractContextManager[None]]] = {VNETDP: _vnetdp, DPDK: _dpdk}
