"""Vnet: a device with its driver, its worker, its endpoints and its traffic, whose frames and invariants are checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
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
from ..errors import ConfigError, GuestError, place, reason
from ..guest.driver import Driver, memory_for
from ..vhost_user.front_end.watch import Watch
from ..virtio import features as f
from ..virtio.queue import TRANSMITQ, queue_of
from ..warmup import warm_up
from . import OWNERS
from .back_end import BackEndProcess
from .checks import Check
from .frames import FrameLedger, ways_of
from .hang import InHand, where_hung
from .history import History, Recorder
from .parts import Offload, as_endpoint, connect, make_offload, start_back_end

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
        back_end: str | None = None,
        pairs: int = 1,
        num: int = 256,
        features: int | str | None = None,
        size: int = 64,
        rate: float = 0.0,
        mtu: int | None = 1500,
        faults: str | Iterable[Fault | str] = (),
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
        if owner not in OWNERS:
            raise ConfigError(f"owner {owner!r} is not one of {', '.join(OWNERS)}")
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
        self.pairs = pairs
        self._made = endpoint
        self._back_end = back_end
        self._num, self._size, self._rate, self._mtu = num, size, rate, mtu
        self._wanted = f.parse(features) if isinstance(features, str) else features
        self._returns, self._raises = returns, raises
        self._patience_s, self._quiet_s = patience_s, quiet_s
        self._stack = ExitStack()
        self._open = False
        self._seen_hung = False
        self._offloaded = False  # whether vhost ever had the rings
        self._offload = Offload()
        self._found: AssertionError | None = None  # it has the state of the device already

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
            self.endpoint = self._make_endpoint(made)
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
            self.driver.start()
            self._stack = made.pop_all()
        self._open = True
        return self

    def _make_endpoint(self, made: ExitStack) -> Endpoint:
        if self._made is None:
            return made.enter_context(GenerateEndpoint(self.pairs, self._size, self._rate))
        if isinstance(self._made, Endpoint):
            return as_endpoint(self._made, self._made)
        make: Any = self._made
        by_class = isinstance(self._made, type) and self.pairs > 1
        return made.enter_context(as_endpoint(make(self.pairs) if by_class else make(), self._made))

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
        return Offload(front_end.backends, worker, front_end)

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
        before = [self._arrived(pair) for pair in range(self.pairs)]

        def more() -> bool:
            if self.ledger.fates:
                self._raise_trouble()  # which may be the cause
                raise self._error(["frames were not as they should be:", *self._frames()])
            return all(
                now >= then + frames
                for pair, each in enumerate(before)
                for now, then in zip(self._arrived(pair), each, strict=True)
            )

        self.wait_until(more, f"{frames} more frames arrive")

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait until *done* returns True; AssertionError, with *what* and the state of the device, if it does not."""
        self._need_open()
        until = time.monotonic() + self._patience_s
        in_hand = InHand(self.endpoint)
        while not done():
            self._raise_trouble()
            stuck_s = in_hand.seconds()
            if time.monotonic() > until:
                self._seen_hung = stuck_s > self._patience_s / 2
                why = [self._hung()] if self._seen_hung else []
                raise self._error([f"never happened within {self._patience_s:g} s: {what}", *why, *self._drops()])
            time.sleep(_LOOK_S)

    def change_owner(self, times: int = 2) -> None:
        """Take the rings from vhost, or give them to it, so many times; 2 is there and back, and runs each verb.

        ConfigError with `owner="userspace"`.
        """
        self._need_open()
        if self.owner == "userspace":
            raise ConfigError("owner 'userspace' has no other owner to change to: take owner='thread' or another")
        for _ in range(times):
            self.device.set_use_vhost(not self.device.use_vhost)
            self._raise_trouble()

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
        if self._comes_back():
            self._check.look("at the end" if last else "at a check")
        else:
            wrong.append(self._hung())
        wrong += self._check.violations
        wrong += self._trouble()
        more = self.ledger.close() if last else []
        frames = self._frames()
        wrong += frames + more
        if frames or more:
            wrong += self._drops()
        if last:
            idle = [fault.text or fault.verb for fault in self.faults if not fault.hits]
            wrong += [f"the fault {name} never struck: no such verb was run" for name in idle]
            if not self._offloaded and self.owner != "userspace" and not any(fault.hits for fault in self.faults):
                wrong.append(
                    f"owner={self.owner!r} never had the rings, and nothing is proven of it: {_NEVER[self.owner]}"
                )
        if wrong:
            raise self._error(wrong)

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
            elif error is not self._found:
                error.add_note(self._state())
        finally:
            for fate in self.ledger.fates:
                self.history.add("frame", **fate.as_dict())
            hung = not self._comes_back()
            if hung:
                self.driver.close()  # the rest can't be closed before the endpoint comes back
            else:
                self._open = False
                seen = len(self._check.violations)
                self._stack.close()
                late = self._check.violations[seen:]
        if error is None and (wrong := [self._hung()] if hung else late):
            raise self._error(wrong)

    def close(self) -> None:
        """Close all without a check; nothing if it is closed, or if the endpoint still hangs."""
        self.__exit__(GeneratorExit, GeneratorExit(), None)

    # --- looking ---

    def _owner_changed(self, gone: bool) -> None:
        device = self.device
        was, self._was = self._was, device.owner
        self._offloaded |= device.owner is Owner.VHOST
        died = was is Owner.VHOST and self._lost(gone)
        elsewhere = (
            was is not Owner.NOBODY and self.owner == "vhost-user" and not isinstance(self.endpoint, GenerateEndpoint)
        )
        self.ledger.owner_changed(
            self._named(device.owner), lambda n: device.queues[n].last_avail_idx, died, left_behind=elsewhere
        )
        self.history.add(
            "owner", owner=self._named(device.owner), indices=[queue.last_avail_idx for queue in device.queues]
        )
        seen = len(self._check.violations)
        self._check.owner_changed()
        for text in self._check.violations[seen:]:
            self.history.add("violation", owner=self._named(device.owner), text=text)

    def _lost(self, gone: bool) -> bool:
        """Return whether a process that had the rings died, rather than gave them back. gone: it did not answer."""
        if (front_end := self._offload.front_end) is not None:
            return front_end.gone or not front_end.connected
        return gone and isinstance(self._offload.worker, WorkerProcess)

    def _named(self, owner: Owner) -> str:
        if owner is not Owner.VHOST:
            return str(owner.value)
        worker = self._offload.worker
        pid = f" {worker.pid}" if isinstance(worker, WorkerProcess | BackEndProcess) else ""
        return f"vhost ({self.owner}{pid})"

    def _generators(self) -> list[GenerateEndpoint]:
        return [end for end in (self.guest, self.endpoint) if isinstance(end, GenerateEndpoint)]

    def _arrived(self, pair: int) -> list[int]:
        """Return the frames of a pair that have arrived, a number a way; of frames that don't return, those that left."""
        return self.ledger.delivered(pair) or [self.driver.counters()[queue_of(pair, TRANSMITQ)]["packets"]]

    def _raise_trouble(self) -> None:
        if wrong := self._trouble(look_far=False):
            raise self._error(wrong)

    def _trouble(self, look_far: bool = True) -> list[str]:
        """Return what stops a test at once: the endpoint raised, or a side of the rings broke the specification.

        look_far: ask the back end's process, too.
        """
        wrong = []
        if self.endpoint.errors and not self._raises:
            error = self.endpoint.last_error
            wrong.append(_raised(self.endpoint.errors, reason(error) + place(error) if error is not None else ""))
        worker = self._offload.worker
        if look_far and isinstance(worker, BackEndProcess) and not self._raises:
            errors, text = worker.errors
            if errors:
                wrong.append(f"in the back end's process: {_raised(errors, text)}")
        if self.driver.error is not None:
            wrong.append(f"the driver's thread has ended: {reason(self.driver.error)}")
        try:
            self.driver.check()
        except GuestError as e:
            wrong.append(f"the device broke the specification: {e}")
        return wrong + [f"the driver broke the specification: {error}" for error in self.device.ring_errors()]

    def _frames(self) -> list[str]:
        fates = self.ledger.fates
        more = len(fates) - _SHOWN
        return [str(fate) for fate in fates[:_SHOWN]] + ([f"and {more} more frames"] if more > 0 else [])

    def _drops(self) -> list[str]:
        """Return a line with the endpoint's counters of frames that it dropped; nothing if there are none."""
        counts = self.endpoint.counters().items()
        drops = [f"{name} {n}" for name, n in counts if n and (name.startswith("dropped") or name == "errors")]
        return [f"the endpoint's own counters: {', '.join(drops)}"] if drops else []

    def _error(self, lines: Sequence[str]) -> AssertionError:
        self._found = AssertionError("\n".join([*lines, self._state()]))
        return self._found

    def _state(self) -> str:
        """Return a line about the device, its owner and its traffic."""
        error = self.device.last_error
        return (
            f"[{self.endpoint.name} after {self.history.now_s():.3f} s: owner {self._named(self.device.owner)}, "
            f"last error {reason(error) if error is not None else None}; {self.ledger.summary}]"
        )

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
        in_hand = InHand(self.endpoint)
        while not (self.ledger.settled() and self._taken()):
            self._raise_trouble()
            now = time.monotonic()
            progress = [self._arrived(pair) for pair in range(self.pairs)]
            if progress != seen:
                seen, since = progress, now
            quiet, stuck_s = now - since, in_hand.seconds()
            if quiet > self._quiet_s and self._taken() and self.endpoint.idle:
                return
            if quiet > self._patience_s:
                waiting = "I9: frames wait in a transmitq or in the endpoint, and nobody takes them"
                self._seen_hung = stuck_s > self._patience_s / 2
                raise self._error([self._hung() if self._seen_hung else waiting])
            time.sleep(_LOOK_S if now - began < 1 else 0.01)

    def _comes_back(self) -> bool:
        """Return whether the endpoint's code comes back, if it is in there: a later look shows."""
        in_hand, call = InHand(self.endpoint), self.endpoint._begun
        while self.endpoint._in_hand and self.endpoint._begun == call:
            if self._seen_hung or in_hand.seconds() > self._patience_s:
                self._seen_hung = True
                return False
            time.sleep(_LOOK_S)
        return True

    def _hung(self) -> str:
        return where_hung(self.endpoint, self._patience_s)


def _raised(errors: int, text: str) -> str:
    return f"the endpoint raised {errors} time{'s' * (errors != 1)}, the last time: {text}"
