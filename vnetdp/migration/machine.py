"""A machine that migrates: guest memory, a device in it, its driver, and traffic in numbered frames.

All state of the guest lies in guest memory: its rings and buffers, its driver's private state, and its end of the
ledger. So it moves with the pages. The other end of the traffic is a host elsewhere on the network: one endpoint,
whose state both machines reach, and only one of them may poll at a time.
"""

from __future__ import annotations

import os
import select
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..backends.base import Backend
from ..backends.faulty import Faults, FaultyNotifiers
from ..backends.process import WorkerProcess
from ..backends.worker import Worker
from ..device.device import NetDevice
from ..endpoints.announce import Announcer
from ..endpoints.base import Endpoint
from ..endpoints.loopback import EchoEndpoint, GenerateEndpoint, Ledger
from ..endpoints.netns import identity
from ..endpoints.spec import Opener, endpoint_opener, parse_endpoint
from ..errors import ConfigError
from ..guest.driver import Driver, driver_block, memory_for
from ..shared.memory import GuestMemory, Region, SharedBlock
from ..system import limits
from ..system.owned import Owned
from .ram import RamSource, pages_of

_DRAIN_S = 30.0  # for all frames that were made: they are few
_SLEEP_S = 1.0  # a call that has not come by then was lost
# Slots of the guest's end of the traffic that stay as they were made; the others count, or hold the next number.
_CONSTANT = [
    slot
    for slot in range(r.EP_SLOTS)
    if slot
    not in (
        *(r.EP_SEQ, r.EP_LIMIT, r.EP_NEXT_NS, r.EP_TO_WIRE, r.EP_FROM_WIRE),
        *(r.EP_DROP_SHORT, r.EP_DROP_LONG, r.EP_DROP_ERROR, r.EP_DROP_NO_BUFFER),
        *(r.EP_DROP_OFFLOAD, r.EP_BYTES_TO_WIRE, r.EP_BYTES_FROM_WIRE),
    )
]
_OF_ONE_PROCESS = ("fault", "pcap", "python", "scapy")  # their state does not reach a destination
_HEADROOM = 64 + spec.NET_HDR_LEN


@dataclass(frozen=True)
class MachineConfig:
    """The settings that two machines have to share, and whether this machine has a vhost worker.

    size: bytes of a frame. rate: frames a second, queue and direction; 0 = as many as pass. first_idx: where the rings'
    indices begin. traffic: as the guest sees it. endpoint: where the device's frames go: to `generate`, numbered frames
    both ways; `echo`, which sends the guest's back; or any other, such as tap:NAME, which is each machine's own.
    faulty: verbs can be made to fail. process: the vhost worker is a process of its own.
    """

    queue_pairs: int = 1
    num: int = 256
    size: int = 64
    rate: float = 0.0
    traffic: str = "both"
    first_idx: int = 0
    vhost: bool = True
    mtu: int = 1500
    endpoint: str = "generate"
    faulty: bool = False
    process: bool = False

    @property
    def to_guest(self) -> int:
        """The limit of frames a queue that the far end makes: -1 = no end."""
        return -1 if self.traffic in ("rx", "both") else 0

    @property
    def to_wire(self) -> int:
        """The limit of frames a queue that the guest makes: -1 = no end."""
        return -1 if self.traffic in ("tx", "both") else 0


class _Numbered(GenerateEndpoint):
    """Either end of the numbered traffic: no frame of it needs an offload, so all of them can be negotiated."""

    vnet_hdr = True


def check_endpoints(source: str, target: str, pairs: int, say: Callable[[str], None]) -> None:
    """Raise ConfigError or EndpointError if no two machines can have these endpoints, found out by trying.

    *say* is told if a TAP is in no bridge: where the guest has moved to, its frames would not follow.
    """
    openers = [_opener(text, pairs) for text in (source, target)]
    taps = [opener.tap for opener in openers]
    if taps[0] is not None and taps[0] == taps[1]:
        raise ConfigError(
            f"tap:{taps[0][0]}: source and destination need a TAP each, both in one bridge: name the destination's with "
            "--target-endpoint tap:NAME"
        )
    with ExitStack() as tried:
        for opener in openers if source != target else openers[:1]:
            tried.enter_context(opener())
        ours = [tap[0] for tap in taps if tap is not None and tap[1] == identity()]
    multi_queue = " multi_queue" if pairs > 1 else ""
    for name in ours:
        if not (Path("/sys/class/net") / name / "master").exists():
            say(
                f"tap:{name} is in no bridge, so frames won't follow the guest to the other TAP: "
                f"sudo ip tuntap add dev {name} mode tap{multi_queue} && sudo ip link set {name} master BRIDGE up"
            )


def _opener(text: str, pairs: int) -> Opener:
    """Return the `Opener` of the endpoint *text*; ConfigError if a machine that is to migrate can't have it."""
    kind, colon, _ = text.partition(":")
    if kind == "generate" and colon:
        raise ConfigError("generate takes no options in migrate: use --size, --rate and --traffic")
    if kind in _OF_ONE_PROCESS:
        raise ConfigError(
            f"{kind}: its frames stay in their process, and do not migrate: take generate, echo or tap:NAME"
        )
    return endpoint_opener(text, pairs)


def make_wire(config: MachineConfig) -> Endpoint:
    """Return the far end of the traffic, where both machines can reach it: only one may poll it at a time."""
    if config.endpoint == "echo":
        return EchoEndpoint(config.queue_pairs)
    return _Numbered(config.queue_pairs, config.size, config.rate, config.to_guest)


class Machine(Owned):
    """One machine, stopped; `boot` or `adopt` it, then `run`. *wire_fd*: the block of `make_wire`; it stays the caller's."""

    def __init__(self, config: MachineConfig, wire_fd: int, faults: Faults | None = None) -> None:
        self.config = config
        self.faults = Faults() if faults is None else faults
        self.driver: Driver | None = None
        self.ram: RamSource | None = None  # while it migrates
        self.announcer: Announcer | None = None
        self.asleep = False  # the guest, when it comes in: it looks at nothing before it is called
        self._stack = ExitStack()
        try:
            self._build(wire_fd)
        except Exception:
            self.close()
            raise

    def _build(self, wire_fd: int) -> None:
        config, enter = self.config, self._stack.enter_context
        pairs = config.queue_pairs
        self.guest: GenerateEndpoint = enter(_Numbered(pairs, config.size, config.rate, config.to_wire))
        self.wire: Endpoint = enter(self._open_wire(wire_fd))
        self._guest_as_made = self.guest.rows[:, _CONSTANT]
        self._block: SharedBlock = driver_block(pairs, config.num)
        self._stack.callback(self._block.close)
        self.memory: GuestMemory = enter(self._guest_memory())
        kind = WorkerProcess if config.process else Worker
        self.worker: Worker | WorkerProcess | None = kind(pairs) if config.vhost else None
        vhost: Sequence[Backend] | None = None
        if self.worker is not None:
            self._stack.callback(self.worker.close)
            vhost = self.faults.wrap(self.worker) if config.faulty else self.worker.backends
        self.notifiers = FaultyNotifiers(pairs, self.faults)
        self.device: NetDevice = enter(
            NetDevice(
                self.memory,
                self.wire,
                queue_pairs=pairs,
                mtu=config.mtu,
                vhost=vhost,
                running=False,
                max_num=max(1024, config.num),
                notifiers=self.notifiers,
            )
        )

    def _open_wire(self, wire_fd: int) -> Endpoint:
        config = self.config
        if config.endpoint == "generate":
            return _Numbered(config.queue_pairs, config.size, config.rate, block_fd=limits.dup(wire_fd))
        if config.endpoint == "echo":
            return EchoEndpoint(config.queue_pairs, limits.dup(wire_fd))
        return parse_endpoint(config.endpoint, config.queue_pairs)

    @property
    def buffer_len(self) -> int:
        return spec.align_up(self.config.size + _HEADROOM, 64) | 64

    def _guest_memory(self) -> GuestMemory:
        """Rings and buffers, twice (they may move), then the guest's end of the ledger, then its driver's memory."""
        with memory_for(2 * self.config.queue_pairs, self.config.num, self.buffer_len) as rings:
            regions = [*rings.regions]
            for block in (self.guest.block, self._block):
                regions.append(Region(regions[-1].gpa + regions[-1].length, block.length, block.fd))
            return GuestMemory(regions)

    # --- running ---

    def boot(self) -> None:
        """Bring the guest's driver up, as at a machine's start."""
        self.driver = self._make_driver(adopt=False)
        for queue in self.device.queues:
            queue.last_avail_idx = self.config.first_idx

    def adopt(self) -> None:
        """Take the guest as it lies in guest memory, which was loaded."""
        self.driver = self._make_driver(adopt=True)

    def check_guest(self) -> None:
        """Check the loaded guest before it runs: its end of the traffic, its driver, and its driver's rings.

        ConfigError if no guest can have left them so: they came from outside, and kernels rely on them.
        """
        assert self.driver is not None
        rows, ledger = self.guest.rows, self.guest.ledger
        if (rows[:, _CONSTANT] != self._guest_as_made).any() or rows.min() < -1:
            raise ConfigError("the guest's end of the traffic does not fit this machine")
        if ledger.min() < 0:
            raise ConfigError(f"the guest's ledger has a count of {ledger.min()}, below 0")
        self.driver.features = self.device.driver_features  # it did not negotiate them
        parts = self.driver.check_adopted(self.memory.regions[0].length)
        for index, (queue, addresses) in enumerate(zip(self.device.queues, parts, strict=True)):
            if queue.enabled and queue.setup != (self.config.num, *addresses):
                raise ConfigError(f"queue {index}: device and driver have different rings")

    def _make_driver(self, adopt: bool) -> Driver:
        config = self.config
        driver = Driver(
            self.device,
            self.memory,
            self.guest,
            queue_pairs=config.queue_pairs,
            num=config.num,
            buffer_len=self.buffer_len,
            block=SharedBlock(self._block.length, os.dup(self._block.fd)),
            adopt=adopt,
            first_idx=config.first_idx,
        )
        self._stack.callback(driver.close)
        return driver

    def run(self) -> None:
        """Let guest and device go on."""
        self.device.set_running(True)
        self.start_guest()

    def start_guest(self) -> None:
        """Let the guest go on; a guest that is asleep and is not called goes on sleeping."""
        assert self.driver is not None
        if not self.asleep or select.select(self.device.calls, [], [], _SLEEP_S)[0]:
            self.driver.start()

    def announce(self) -> None:
        """Tell the network where the guest is now; takes 0.8 s, beside everything else."""
        self.announcer = Announcer(self.device.endpoint.send_to_wire, lambda: self.device.control.mac)

    def hold_announcing(self, held: bool) -> None:
        """Announce nothing while it may be that the guest runs elsewhere."""
        if self.announcer is not None:
            self.announcer.hold(held)

    def end_announcing(self) -> None:
        if self.announcer is not None:
            self.announcer.close()
            self.announcer = None

    def stop(self) -> None:
        """Stop the device, then the guest: the rings stand still afterwards, and indices are exact.

        Frames of the guest stay in its rings meanwhile: vhost is stopped where it is, and finishes nothing first.
        """
        self.device.set_running(False)
        if self.driver is not None:
            self.driver.stop()

    def private_ranges(self) -> list[tuple[int, int]]:
        """Return (guest address, bytes) of ranges that the guest alone writes: desc, avail, sent frames, its memory."""
        assert self.driver is not None
        ranges = [(region.gpa, region.length) for region in self.memory.regions[1:]]
        return self.driver.private_ranges() + ranges

    # --- its ledgers and counters ---

    def ledgers(self) -> tuple[Ledger, Ledger]:
        """Return the ledgers of frames to the wire and of frames to the guest; empty if unknown, as for a TAP."""
        if isinstance(self.wire, GenerateEndpoint):
            return self.wire.ledger_against(self.guest), self.guest.ledger_against(self.wire)
        if isinstance(self.wire, EchoEndpoint):
            return Ledger(), self.guest.ledger_against(self.guest)
        return Ledger(), Ledger()

    def allow(self, traffic: bool) -> None:
        """Let both ends make frames, as the traffic asked for says, or none after those made by now.

        Both ends are paused meanwhile: a frame that was begun under the limit before would be made, and
        counted, after all were seen to have arrived.
        """
        with self.device.paused(), self.driver.paused() if self.driver is not None else nullcontext():
            for end, limit in ((self.wire, self.config.to_guest), (self.guest, self.config.to_wire)):
                if isinstance(end, GenerateEndpoint):
                    end.rows[:, r.EP_LIMIT] = limit if traffic else end.rows[:, r.EP_SEQ]

    def drain(self, seconds: float = 3.0) -> bool:
        """Make no more frames, and return whether all that were made arrive.

        False if none does for so many seconds, or some have not after 30 s: another machine may be on the wire.
        """
        self.allow(False)
        self.device.set_link(True)  # frames that wait for it are not lost
        seen, since = self.ledgers(), time.monotonic()
        until = since + _DRAIN_S
        while any(ledger.sent != ledger.delivered for ledger in seen):
            before, seen = seen, self.ledgers()
            now = time.monotonic()
            if seen != before:
                since = now
            if now > min(since + seconds, until):
                return False
            time.sleep(0.0005)
        return True

    def memory_sums(self) -> list[int]:
        """Return the CRC-32 of each region of guest memory, to which nothing may write meanwhile."""
        pages = pages_of(self.memory).reshape(-1)
        at = 0
        sums = []
        for region in self.memory.regions:
            sums.append(zlib.crc32(pages[at : at + region.length].data))
            at += region.length
        return sums

    def on_close(self, call: Callable[[], None]) -> None:
        """Have *call* called before anything is given up."""
        self._stack.callback(call)

    def close(self) -> None:
        """Stop everything and give it up."""
        if self.driver is not None:
            self.driver.stop()
        self.end_announcing()
        self._stack.close()
