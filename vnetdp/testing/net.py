"""Vnet: a device with its driver, its worker, its endpoints and its traffic, whose frames and invariants are checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from numbers import Integral
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..backends.faulty import Fault, Faults
from ..backends.process import WorkerProcess
from ..backends.worker import Worker
from ..device import vhost_net
from ..device.device import NetDevice
from ..device.owners import Owner
from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint
from ..errors import ConfigError
from ..guest.driver import Driver, memory_for
from ..vhost_user.front_end.watch import Watch
from ..virtio import features as f
from ..virtio.queue import TRANSMITQ, queue_of
from ..warmup import warm_up
from . import OWNERS
from .back_end import BackEndProcess
from .checks import Check
from .findings import Findings
from .frames import FrameLedger, ways_of
from .history import History, Recorder
from .parts import Offload, check_numbers, connect, make_endpoint, make_offload, start_back_end

_LOOK_S = 0.0005
_SHOWN = 10  # frames in an error

_NEVER = {
    "thread": "the last error has the reason",
    "process": "a worker process refuses an endpoint in Python; take owner='thread' or 'vhost-user' for one",
    "vhost-user": "the back end was lost, or refused the rings",
}  # why an owner never had the rings

_warm_up_once = cache(warm_up)  # a second call costs ms

_Made = Endpoint | type[Endpoint] | Callable[[], Endpoint]


class Vnet:
    """A device under traffic, for one test. In a `with` block frames move; at its end each of them is accounted for.

    - `endpoint`: the endpoint under test: its class, which is called without an argument (with the number of queue pairs if
      there are several), another function that returns it, or an endpoint, which the caller closes. It sends each frame
      back. None: a `GenerateEndpoint`, which sends frames of its own and checks those of the guest.
    - `owner`: the owner of the rings: `userspace` alone, a worker in a `thread` or a `process`, or a `vhost-user` back end
      in a process of its own, with an endpoint of its own of the same class. A worker process refuses an endpoint in
      Python. An owner that never had the rings is an error, unless a fault struck.
    - `back_end`: the path of the socket of a vhost-user back end of your own, in place of one in a process, with owner
      `vhost-user`. It sends each frame back; `endpoint` serves the rings while it is away.
    - `pairs`, `num`: queue pairs, and descriptors of each queue.
    - `features`: feature bits, or their names as `features.parse` takes them (`"-event_idx"`); None takes all.
    - `size`, `rate`: bytes of a frame, at most `mtu` + 14, and frames a second and queue pair; 0 sends as fast as the
      rings take them.
    - `mtu`: the MTU that the device offers; None offers none.
    - `faults`: each a `Fault`, which is copied, or a text of one, from the start on. A fault that never struck is an error.
    - `returns`: False for an endpoint that does not send each frame back: the frames are not counted then.
    - `raises`: True for an endpoint whose code may raise; otherwise an exception in it fails the test.
    - `patience_s`: seconds after which a wait is given up, and an endpoint that has not come back counts as hung.
    - `quiet_s`: seconds without a frame, at the end, after which the frames that have not arrived count as lost; at most
      `patience_s`.
    """

    device: NetDevice
    """The device."""
    driver: Driver
    """The guest's driver, which runs in a thread."""
    guest: GenerateEndpoint
    """The guest's endpoint: it sends numbered frames, and checks those that arrive."""
    endpoint: Endpoint
    """The device's endpoint: the one under test."""
    worker: Worker | WorkerProcess | BackEndProcess
    """The worker or back end, with `kill`, `fail` and `hang`. AttributeError if there is none, or it is your own."""
    ledger: FrameLedger
    """The frames so far: counts, and which were lost, doubled, late or corrupted."""

    def __init__(
        self,
        endpoint: _Made | None = None,
        *,
        owner: str = "thread",
        back_end: str | PathLike[str] | None = None,
        pairs: int = 1,
        num: int = 256,
        features: int | str | None = None,
        size: int = 64,
        rate: float = 0.0,
        mtu: int | None = 1500,
        faults: str | Fault | Iterable[Fault | str] = (),
        returns: bool = True,
        raises: bool = False,
        patience_s: float = 60.0,
        quiet_s: float = 5.0,
    ) -> None:
        if not (endpoint is None or isinstance(endpoint, Endpoint) or callable(endpoint)):
            raise ConfigError(
                f"endpoint={endpoint!r} is none: give an Endpoint, its class or a function that returns it; "
                "vnetdp.parse_endpoint makes one from text"
            )
        check_numbers(
            {"pairs": pairs, "num": num, "size": size} | ({} if mtu is None else {"mtu": mtu}),
            {"rate": rate, "patience_s": patience_s, "quiet_s": quiet_s},
        )
        if not (features is None or isinstance(features, int | str)):
            raise ConfigError(f"features={features!r} are none: give bits, or names such as '-event_idx'")
        if owner not in OWNERS:
            raise ConfigError(f"owner {owner!r} is not one of {', '.join(OWNERS)}")
        if not (back_end is None or isinstance(back_end, str | PathLike)):
            raise ConfigError(f"back_end={back_end!r} is no path of a socket")
        if back_end is not None and owner != "vhost-user":
            raise ConfigError(f"back_end {back_end}: owner {owner!r} has none; take 'vhost-user'")
        if not 0 <= quiet_s <= patience_s:
            raise ConfigError(f"quiet_s={quiet_s:g} is not between 0 and patience_s={patience_s:g}")
        if mtu is not None and size > mtu + spec.ETH_HLEN:
            raise ConfigError(
                f"size={size}: with mtu={mtu} a frame has up to {mtu + spec.ETH_HLEN} bytes; give more mtu="
            )
        self.owner = owner
        """The owner that was asked for, one of `OWNERS`; `device.owner` is the present one."""
        self._faults = Faults(
            replace(fault, hits=0) for fault in Faults(faults)
        )  # of its own, which others don't spend
        for fault in self._faults:
            if (fault.pair or 0) >= pairs:
                raise ConfigError(
                    f"fault {fault.text or fault}: its ring is none of 0,0 to {pairs - 1},1 (PAIR,VRING) with pairs={pairs}"
                )
        self.history = History()
        """The events so far, for a report of a test that failed."""
        self.pairs = int(pairs)
        self._made = endpoint
        self._back_end = None if back_end is None else fspath(back_end)
        self._num, self._size, self._rate = int(num), int(size), float(rate)
        self._mtu = None if mtu is None else int(mtu)
        self._wanted = f.parse(features) if isinstance(features, str) else features
        self._returns, self._raises = returns, raises
        self._patience_s, self._quiet_s = patience_s, quiet_s
        self._stack = ExitStack()
        self._open = False
        self._offloaded = False  # whether vhost ever had the rings
        self._offload = Offload()

    @property
    def faults(self) -> Faults:
        """The faults of vhost's verbs, a list that may change at any time. Those of the argument are copies."""
        return self._faults

    # --- making it ---

    def __enter__(self) -> Self:
        if self._open:
            raise ConfigError("the Vnet is open already: leave its with block first, or make another")
        _warm_up_once()
        with ExitStack() as made:
            self.memory = made.enter_context(memory_for(self.pairs, self._num))
            self.endpoint = make_endpoint(made, self._made, self.pairs, self._size, self._rate)
            self.guest = made.enter_context(GenerateEndpoint(self.pairs, self._size, self._rate))
            self.ledger = FrameLedger(ways_of(self.guest, self.endpoint, self._returns), self.pairs, self.history.now_s)
            self.device = self._make_device(made)
            self._check = Check(self.device)
            self._was = Owner.NOBODY
            self.device.on_owner.append(self._owner_changed)
            self.driver = made.enter_context(
                Driver(
                    self.device, self.memory, self.guest, queue_pairs=self.pairs, num=self._num, wanted=self._wanted,
                    frame_len=self._size,
                )
            )  # fmt: skip
            self._findings = Findings(
                self.endpoint,
                self.device,
                self.driver,
                self.ledger,
                self._offload,
                now_s=self.history.now_s,
                may_raise=self._raises,
                patience_s=self._patience_s,
            )
            self.driver.start()
            self._stack = made.pop_all()
        self._open = True
        return self

    def _make_device(self, made: ExitStack) -> NetDevice:
        self._offload = offload = self._make_offload(made)
        if offload.worker is not None:
            self.worker = offload.worker
        front_end = offload.front_end
        vhost = [Recorder(backend, pair, self.faults, self.history) for pair, backend in enumerate(offload.backends)]
        device = made.enter_context(
            NetDevice(
                self.memory, self.endpoint, queue_pairs=self.pairs, vhost=vhost or None, mtu=self._mtu,
                offered=None if front_end is None else front_end.features, max_num=max(1024, self._num),
            )
        )  # fmt: skip
        if front_end is not None:
            watch = Watch(front_end, device)
            made.callback(watch.close)
        return device

    def _make_offload(self, made: ExitStack) -> Offload:
        if self.owner != "vhost-user":
            return make_offload(made, self.owner, self.pairs)
        path, worker = self._back_end, None
        if path is None:
            served = self.endpoint if isinstance(self.endpoint, GenerateEndpoint) else self._made
            worker, path = start_back_end(made, served, self.pairs, self._mtu)
        front_end = connect(made, path, self.pairs, self._num, self._patience_s)
        return Offload(self.owner, front_end.backends, worker, front_end)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say why an attribute is not there."""
            why = f"{type(self).__name__} has no attribute {name!r}"
            if name == "worker" and self.__dict__.get("_open"):
                why = (
                    f"Vnet.worker: {'the back end is your own' if self._back_end else f'owner {self.owner!r} has none'}"
                )
            elif name in Vnet.__annotations__ or name == "memory":
                why = f"Vnet.{name} is there in the with block only: with Vnet(...) as vnet"
            raise AttributeError(why)

    # --- using it ---

    def _need_open(self) -> None:
        if not self._open:
            raise ConfigError("the Vnet is not open: use it in its with block: with Vnet(...) as vnet")

    def wait_for(self, frames: int) -> None:
        """Wait until so many more frames of each queue pair have arrived, each way; AssertionError if they don't.

        An endpoint that raised, a ring that broke and a frame that was lost, doubled, late or corrupted end the wait, too.
        """
        self._need_open()
        if not isinstance(frames, Integral) or frames < 0:
            raise ConfigError(f"wait_for({frames!r}): give a number of frames from 0")
        if not self.ledger.running:
            raise ConfigError("wait_for: the traffic has been settled, and no frame comes: call start() first")
        before = [self._arrived(pair) for pair in range(self.pairs)]

        def more() -> bool:
            if self.ledger.fates:
                self._findings.raise_trouble()  # which may be the cause
                raise self._findings.error(["frames were not as they should be:", *self._findings.frames()])
            return all(
                now >= then + frames
                for pair, each in enumerate(before)
                for now, then in zip(self._arrived(pair), each, strict=True)
            )

        self.wait_until(more, f"{frames} more frames arrive")

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait until *done* returns True; AssertionError, with *what* and the state of the device, if it does not."""
        self._need_open()
        if not callable(done):
            raise ConfigError(f"wait_until({done!r}): give a function that returns True once it has happened")
        until = time.monotonic() + self._patience_s
        in_hand = self._findings.hang.watch()
        while not done():
            self._findings.raise_trouble()
            stuck_s = in_hand.seconds()
            if time.monotonic() > until:
                why = self._findings.hang.at_the_end_of(stuck_s) + self._findings.drops()
                never = f"never happened within {self._patience_s:g} s: {what}"
                raise self._findings.error([never, *(why or self._findings.silence())])
            time.sleep(_LOOK_S)

    def change_owner(self, times: int = 2) -> None:
        """Take the rings from vhost, or give them to it, so many times; 2 is there and back, and runs each verb.

        ConfigError with `owner="userspace"`.
        """
        self._need_open()
        if self.owner == "userspace":
            raise ConfigError("owner 'userspace' has no other owner to change to: take owner='thread' or another")
        if not isinstance(times, Integral) or times < 1:
            raise ConfigError(f"change_owner({times!r}): give a number of changes from 1")
        for _ in range(times):
            if not self._findings.hang.comes_back():  # the owner could not be stopped
                raise self._findings.error([self._findings.hang.text()])
            self.device.set_use_vhost(not self.device.use_vhost)
            self._findings.raise_trouble()

    def start(self) -> None:
        """Have frames made again, after `stop` or `settle`."""
        self._need_open()
        self.ledger.running = True
        for end in self._generators():
            end.rows[:, r.EP_LIMIT] = -1
        self.driver.bell.signal()
        for kick in self.device.kicks:
            kick.signal()

    def stop(self) -> None:
        """Make no more frames. Those under way still arrive."""
        self._need_open()
        with self.driver.paused():
            self.guest.stop()
        if isinstance(self.endpoint, GenerateEndpoint):
            # A remote back end can't be paused: a frame that it is just making still comes.
            with self.device.paused() if self.owner != "vhost-user" else nullcontext():
                self.endpoint.stop()

    def settle(self) -> None:
        """Stop the traffic, wait until all frames have arrived, and check all; AssertionError names each thing wrong."""
        self.stop()
        self._drain()
        self.check(last=True)

    def check(self, last: bool = False) -> None:
        """Check invariants, frames and endpoint now, under traffic too; AssertionError names each thing that is wrong.

        last: True also takes frames that have not arrived for lost, and faults that never struck for a mistake.
        """
        self._need_open()
        wrong: list[str] = []
        if self._findings.hang.comes_back():
            self._check.look("at the end" if last else "at a check")
        else:
            wrong.append(self._findings.hang.text())
        wrong += self._check.violations
        wrong += self._findings.trouble()
        more = self.ledger.close() if last else []
        frames = self._findings.frames()
        wrong += frames + more
        if frames or more:
            wrong += self._findings.drops()
        if last:
            idle = [fault.text or fault.verb for fault in self.faults if not fault.hits]
            wrong += [f"the fault {name} never struck: no such verb was run" for name in idle]
            if not self._offloaded and self.owner != "userspace" and not any(fault.hits for fault in self.faults):
                wrong.append(
                    f"owner={self.owner!r} never had the rings, and nothing is proven of it: {_NEVER[self.owner]}"
                )
        if wrong:
            raise self._findings.error(wrong)

    # --- the end ---

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        late: list[str] = []
        try:
            if error is None:
                self.settle()
            elif error is not self._findings.raised:
                error.add_note(self._findings.state())
        finally:
            for fate in self.ledger.fates:
                self.history.add("frame", **fate.as_dict())
            hung = not self._findings.hang.comes_back()
            if hung:
                self.driver.close()  # the rest can't be closed before the endpoint comes back
            else:
                self._open = False
                seen = len(self._check.violations)
                self._stack.close()
                late = self._check.violations[seen:]
        if error is None and (wrong := [self._findings.hang.text()] if hung else late):
            raise self._findings.error(wrong)

    def close(self) -> None:
        """Close all without a check; nothing if it is closed, or if the endpoint still hangs."""
        self.__exit__(GeneratorExit, GeneratorExit(), None)

    # --- looking ---

    def _owner_changed(self, gone: bool) -> None:
        device = self.device
        was, self._was = self._was, device.owner
        self._offloaded |= device.owner is Owner.VHOST
        died = was is Owner.VHOST and self._offload.died(gone)
        elsewhere = (
            was is not Owner.NOBODY and self.owner == "vhost-user" and not isinstance(self.endpoint, GenerateEndpoint)
        )
        self.ledger.owner_changed(
            self._offload.named(device.owner), lambda n: device.queues[n].last_avail_idx, died, left_behind=elsewhere
        )
        self.history.add(
            "owner", owner=self._offload.named(device.owner), indices=[queue.last_avail_idx for queue in device.queues]
        )
        seen = len(self._check.violations)
        self._check.owner_changed()
        for text in self._check.violations[seen:]:
            self.history.add("violation", owner=self._offload.named(device.owner), text=text)

    def _generators(self) -> list[GenerateEndpoint]:
        return [end for end in (self.guest, self.endpoint) if isinstance(end, GenerateEndpoint)]

    def _arrived(self, pair: int) -> list[int]:
        """Return the frames of a pair that have arrived, a number a way; of frames that don't return, those that left."""
        return self.ledger.delivered(pair) or [self.driver.counters()[queue_of(pair, TRANSMITQ)]["packets"]]

    def _taken(self) -> bool:
        """Return whether the device has used every chain that the driver made available for sending."""
        for pair in range(self.pairs):
            n = queue_of(pair, TRANSMITQ)
            used = vhost_net.used_idx(self.memory, self.device.queues[n])
            if used != self.driver.dvqs[n, r.DVQ_PUBLISHED_IDX]:
                return False
        return True

    def _drain(self) -> None:
        """Wait until all frames have arrived, or none has for a while, though nobody has one in hand."""
        began = since = time.monotonic()
        seen: object = None
        in_hand = self._findings.hang.watch()
        while not (self.ledger.settled() and self._taken()):
            self._findings.raise_trouble()
            now = time.monotonic()
            progress = [self._arrived(pair) for pair in range(self.pairs)]
            if progress != seen:
                seen, since = progress, now
            quiet, stuck_s = now - since, in_hand.seconds()
            if quiet > self._quiet_s and self._taken() and self.endpoint.idle:
                return
            if quiet > self._patience_s:
                waiting = "I9: frames wait in a transmitq or in the endpoint, and nobody takes them"
                raise self._findings.error(self._findings.hang.at_the_end_of(stuck_s) or [waiting])
            time.sleep(_LOOK_S if now - began < 1 else 0.01)
