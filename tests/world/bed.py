"""Worlds to save: a few hosts of different kinds with one clock and one list of faults, and steps for them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final, Self

from hypothesis import strategies as st

from vnetdp import (
    BackendError,
    Clock,
    Datapath,
    Driver,
    EchoEndpoint,
    Endpoint,
    EndpointError,
    FaultEndpoint,
    Faults,
    FaultyBackend,
    FrameEndpoint,
    GenerateEndpoint,
    MailboxEndpoint,
    NetDevice,
    Owner,
    UserspaceBackend,
    World,
    features,
    memory_for,
)
from vnetdp.virtio.queue import is_receiveq

Step = tuple[Any, ...]

NUM: Final = 8
PAIRS: Final = 2
FIRST_IDX: Final = 0xFFFA  # each queue wraps soon


class Numbering(FrameEndpoint):
    """It answers each frame with the number of frames that came before, which is its own state."""

    name = "numbering"

    def __init__(self, queues: int = 1) -> None:
        super().__init__(queues)
        self.seen = [0] * queues

    def frame_received(self, frame: bytes, queue: int) -> bytes:
        self.seen[queue] += 1
        if self.seen[queue] % 5 == 0:
            raise ValueError(f"frame {self.seen[queue]}")
        return frame[6:12] + frame[:6] + self.seen[queue].to_bytes(50, "big")

    def save_own(self) -> object:
        return self.seen

    def load_own(self, data: object) -> None:
        assert isinstance(data, list)
        self.seen[:] = data


def wire_of(kind: str, seed: int) -> Endpoint:
    if kind == "lossy":
        return FaultEndpoint(MailboxEndpoint(PAIRS), drop=0.1, corrupt=0.1, duplicate=0.2, reorder=0.3, seed=seed)
    if kind == "slow":
        far = FaultEndpoint(Numbering(PAIRS), delay_ms=2, jitter_ms=1, eagain=0.2, burst=(0.1, 0.5), seed=seed)
        return FaultEndpoint(far, rate=1e6, eio=0.1, seed=seed + 1)
    if kind == "echo":
        return FaultEndpoint(EchoEndpoint(PAIRS), delay_ms=1, duplicate=0.3, seed=seed)
    if kind == "generate":
        return GenerateEndpoint(PAIRS, rate=500)
    of: dict[str, type[Endpoint]] = {"mailbox": MailboxEndpoint, "numbering": Numbering, "plain echo": EchoEndpoint}
    return of[kind](PAIRS)


KINDS: Final = ("lossy", "slow", "echo", "generate", "mailbox", "numbering", "plain echo")


class Host:
    """A guest, its device, its vhost and its wire."""

    def __init__(self, kind: str, seed: int, clock: Clock, faults: Faults, private: bool = False) -> None:
        self.stack = ExitStack()
        self.memory = self.stack.enter_context(memory_for(PAIRS, NUM, 2112, private=private))
        self.wire = self.stack.enter_context(wire_of(kind, seed))
        self.vhost = Datapath(PAIRS)
        self.stack.callback(self.vhost.close)
        backends = [FaultyBackend(UserspaceBackend(self.vhost, pair), pair, faults) for pair in range(PAIRS)]
        self.device = self.stack.enter_context(
            NetDevice(
                self.memory,
                self.wire,
                queue_pairs=PAIRS,
                vhost=backends,
                threaded=False,
                running=False,
                clock=clock,
            )
        )
        end = self.stack.enter_context(GenerateEndpoint(PAIRS, rate=700)) if kind == "generate" else None
        # Buffers of one size, which fit into little memory; and EVENT_IDX for every other host.
        wanted = features.RING_FEATURES | features.VIRTIO_NET_F_MRG_RXBUF
        self.guest = self.stack.enter_context(
            Driver(
                self.device,
                self.memory,
                end,
                queue_pairs=PAIRS,
                num=NUM,
                wanted=wanted & ~(features.VIRTIO_RING_F_EVENT_IDX * (seed % 2)),
                first_idx=FIRST_IDX,
            )
        )
        for queue in self.device.queues:
            queue.last_avail_idx = FIRST_IDX
        self.device.set_running(True)


class Bed:
    """Hosts with wires of *kinds*, and their `World`."""

    def __init__(self, *kinds: str, private: bool = False) -> None:
        self.clock, self.faults = Clock(5), Faults()
        self.hosts = [Host(kind, seed, self.clock, self.faults, private) for seed, kind in enumerate(kinds)]
        self.world = World(*(host.guest for host in self.hosts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts:
            host.stack.close()

    def do(self, steps: list[Step]) -> list[object]:
        """Do each step; return all that came of them."""
        return [self._did(name, self.hosts[host % len(self.hosts)], *args) for name, host, *args in steps]

    def _did(self, name: str, host: Host, *args: Any) -> object:
        try:
            moved = getattr(self, f"_{name}")(host, *args)
        except (BackendError, EndpointError) as e:
            moved = str(e)
        inner = host.wire.innermost
        received = host.guest.receive() if host.guest.mailbox is not None else []
        taken = inner.take_raw() if isinstance(inner, MailboxEndpoint) and name == "vhost" else []
        error = host.device.last_error
        return moved, received, taken, host.device.owner, str(error), inner.errors, self.clock.next_due_ns()

    def _send(self, host: Host, pair: int, count: int, length: int) -> int:
        sent = 0
        if host.guest.mailbox is not None:
            sent = sum(host.guest.send(bytes([n, length & 0xFF]) * (length // 2), pair) for n in range(count))
        return sent

    def _put(self, host: Host, pair: int, count: int, length: int) -> int:
        inner = host.wire.innermost
        put = inner.put if isinstance(inner, MailboxEndpoint) else getattr(inner, "send", None)
        return sum(put(bytes([length & 0xFF, n]) * (length // 2), queue=pair) for n in range(count)) if put else 0

    def _guest(self, host: Host, budget: int) -> int:
        return host.guest.step(budget)

    def _device(self, host: Host, budget: int) -> int:
        return host.device.step(budget)

    def _vhost(self, host: Host, budget: int) -> int:
        moved = host.vhost.run(budget)[1]
        host.device.check_rings()
        return moved

    def _advance(self, host: Host, ns: int) -> None:
        self.clock.advance_to(self.clock.now_ns + ns)

    def _use(self, host: Host, vhost: bool) -> Owner:
        host.device.set_use_vhost(vhost)
        return host.device.owner

    def _link(self, host: Host, up: bool) -> None:
        host.device.set_link(up)

    def _fault(self, host: Host, text: str) -> int:
        self.faults.append(text)
        return len(self.faults)

    def _mend(self, host: Host) -> int:
        hits = sum(fault.hits for fault in self.faults)
        self.faults.clear()
        return hits

    def _status(self, host: Host) -> None:
        host.device.set_status(host.device.status)

    def _reset(self, host: Host) -> None:
        host.guest.reset()

    def _queue(self, host: Host, index: int) -> None:
        host.device.reset_queue(index)
        if not is_receiveq(index):
            host.guest.step(-1)
        host.guest.lay_out(index, host.guest.place_of(index)[0])

    def _drop(self, host: Host, chance: float) -> None:
        if isinstance(host.wire, FaultEndpoint):
            host.wire.set(drop=chance)


BUDGETS = st.sampled_from([1, 2, 5, 64])
HOSTS = st.integers(0, 1)
_MOVES = (
    st.tuples(st.just("send"), HOSTS, st.integers(0, PAIRS - 1), st.integers(1, 5), st.sampled_from([60, 2500, 4])),
    st.tuples(st.just("put"), HOSTS, st.integers(0, PAIRS - 1), st.integers(1, 5), st.sampled_from([60, 2500, 4])),
    *(st.tuples(st.just(name), HOSTS, BUDGETS) for name in ("guest", "device", "vhost")),
)
_CHANGES = (
    st.tuples(st.just("advance"), HOSTS, st.sampled_from([1, 300_000, 1_000_000, 1_100_000_000])),
    st.tuples(st.just("use"), HOSTS, st.booleans()),
    st.tuples(st.just("link"), HOSTS, st.booleans()),
    st.tuples(
        st.just("fault"),
        HOSTS,
        st.sampled_from(
            ["set_vring_addr:1,0", "set_backend:#2", "set_features:always", "get_vring_base:0,1", "unbind:once"]
        ),
    ),
    st.tuples(st.just("drop"), HOSTS, st.sampled_from([0.0, 0.5])),
    st.tuples(st.just("queue"), HOSTS, st.integers(0, 2 * PAIRS - 1)),
    *(st.tuples(st.just(name), HOSTS) for name in ("mend", "status", "reset")),
)
STEPS = st.lists(st.one_of(*_MOVES, *_MOVES, *_MOVES, *_CHANGES), max_size=60)
