"""Three queue pairs between two owners, with every verb recorded: what tests of owners lie on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.by_hand import frame, wait_equal
from vnetdp.backends.base import Backend
from vnetdp.backends.faulty import Faults, FaultyBackend, FaultyNotifiers, point_of
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.verbs import Verb
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.device import vhost_net
from vnetdp.device.owners import Owner, Owners
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.shared.memory import DirtyLog, GuestMemory
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import TRANSMITQ, VRINGS, Virtqueue
from vnetdp_kernels import rows as r

Call = tuple[str, int, int | None]

PAIRS = 3
QUEUES = VRINGS * PAIRS
NUM = 8
BASE = 0xFFFE
FRAMES = 3  # that wait in each ring, each way
FEATURES = f.VIRTIO_F_VERSION_1
A_DEVICE = ("set_mtu", "set_features", "set_memory", "set_log")
A_RING = ("set_vring_num", "set_vring_base", "set_vring_addr", "set_vring_kick", "set_vring_call")
NOTIFIERS = ("grab_ioeventfd", "set_host_notifier", "set_guest_notifiers")


def of_rings(verbs: Sequence[str], *queues: int) -> list[Call]:
    """Return the calls of these verbs for each of these rings, ring by ring."""
    return [(verb, *divmod(n, VRINGS)) for n in queues for verb in verbs]


def of_pairs(*verbs: str) -> list[Call]:
    return [(verb, pair, None) for pair in range(PAIRS) for verb in verbs]


def whole_start() -> list[Call]:
    """Return every call of a start but the binding, in order."""
    calls: list[Call] = []
    for pair in range(PAIRS):
        calls += [(verb, pair, None) for verb in A_DEVICE]
        calls += of_rings(A_RING, VRINGS * pair, VRINGS * pair + 1)
    return calls


class Recorder(FaultyBackend):
    """A backend that notes each verb in *calls*, may fail by name, and binds rings at once if it is allowed to."""

    def __init__(self, inner: Backend, pair: int, faults: Faults, calls: list[Call]) -> None:
        super().__init__(inner, pair, faults)
        self.calls = calls
        self.at_once = False
        self.parked = 0

    def apply(self, verb: Verb) -> int:
        self.calls.append((point_of(verb), self._pair, verb.index))
        return super().apply(verb)

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        if not self.at_once:
            return False
        done = self.inner.bind_rings(bases, endpoint)
        self.calls.append(("bind_rings" if done else "refused", self._pair, None))
        return done

    def park(self, parked: bool) -> None:
        self.parked += 1 if parked else -1
        super().park(parked)


class Bed:
    """Both owners of three pairs whose indices begin at BASE: workers behind recorders, and a datapath to step.

    workers: over how many threads vhost's pairs are spread. In each ring wait FRAMES chains.
    """

    def __init__(self, workers: int = 1, endpoint: Endpoint | None = None) -> None:
        self.memory = GuestMemory.create([(0, 1 << 20)])
        self.endpoint = endpoint or NullEndpoint(PAIRS)
        self.workers = [Worker(PAIRS) for _ in range(workers)]
        self.stepped = Datapath(PAIRS)
        self.faults = Faults()
        self.calls: list[Call] = []
        self.vhost = [
            Recorder(self.workers[pair % workers].backends[pair], pair, self.faults, self.calls)
            for pair in range(PAIRS)
        ]
        self.notifiers = FaultyNotifiers(PAIRS, self.faults)
        userspace = [UserspaceBackend(self.stepped, pair) for pair in range(PAIRS)]
        self.owners = Owners(userspace, self.vhost, self.notifiers)
        self.ring_list: list[HandRing] = []
        at = 0
        for _ in range(QUEUES):
            self.ring_list.append(HandRing(self.memory, at, NUM, BASE))
            at = self.ring_list[-1].end
        self.free = at  # guest memory from here on
        self.log: DirtyLog | None = None
        self.logs: list[DirtyLog] = []
        self.features = FEATURES
        self.mtu: int | None = 1500
        self.queues = [Virtqueue(NUM, r.desc, r.avail, r.used, True, BASE) for r in self.ring_list]
        for n, ring in enumerate(self.ring_list):
            for k in range(FRAMES):
                ring.send(k, frame(k)) if n % VRINGS == TRANSMITQ else ring.post(k)

    @property
    def rings(self) -> vhost_net.Rings:
        kicks, calls = self.notifiers.kicks, self.notifiers.calls
        return vhost_net.Rings(self.queues, kicks, calls, self.endpoint, self.memory, self.log, self.features, self.mtu)

    @property
    def datapath(self) -> Datapath:
        return self.workers[0].datapath

    def new_log(self) -> DirtyLog:
        self.logs.append(DirtyLog(self.memory.end))
        return self.logs[-1]

    def bases(self) -> list[int]:
        return [queue.last_avail_idx for queue in self.queues]

    def used(self) -> list[int]:
        return [ring.used_idx for ring in self.ring_list]

    def told(self) -> list[Call]:
        """Return the calls since this was last asked."""
        calls = self.calls[:]
        self.calls.clear()
        return calls

    def content(self) -> bytes:
        return self.memory.read(0, self.memory.end)

    # --- what has to be true at every moment ---

    def check(self, owner: Owner, prepared: bool = False) -> None:
        """Who owns the rings has them, and nobody else anything of them."""
        owners = self.owners
        assert owners.owner is owner
        assert (owners.prepared is not None) is prepared
        counts = (self.notifiers.grabs, self.notifiers.host, self.notifiers.guest)
        with_vhost = prepared or owner is Owner.VHOST
        assert counts == ((PAIRS, QUEUES, 1) if with_vhost else (0, 0, 0)), "I7"
        assert self.notifiers.balanced
        assert sum(recorder.parked for recorder in self.vhost) == (len(self.workers) if prepared else 0)
        assert [bool(w.datapath.ctl[r.CTL_DOORBELL]) for w in self.workers] == [prepared] * len(self.workers)
        n_vhost = sum(int(worker.datapath.vqs[:, r.VQ_BOUND].sum()) for worker in self.workers)
        n_userspace = int(self.stepped.vqs[:, r.VQ_BOUND].sum())
        enabled = sum(queue.enabled for queue in self.queues)
        assert n_vhost == (enabled if owner is Owner.VHOST else 0), "I5"
        assert n_userspace == (enabled if owner is Owner.USERSPACE else 0), "I5"
        pollers = 0 if owner is Owner.NOBODY else len({n // 2 for n, q in enumerate(self.queues) if q.enabled})
        assert len(self.endpoint.polled_by) == pollers, "I6"
        assert self.endpoint.polls_started - self.endpoint.polls_stopped == pollers, "I7"
        if owner is Owner.NOBODY:
            assert self.bases() == [vhost_net.used_idx(self.memory, queue) for queue in self.queues], "I3"

    def vhost_serves(self) -> None:
        """Have vhost move what waits in the transmitqs, without a kick."""
        assert self.owners.hand_to(Owner.VHOST, self.rings), self.owners.last_error
        self.check(Owner.VHOST)
        self.wait_until_sent()

    def wait_until_sent(self) -> None:
        rings = self.ring_list[TRANSMITQ::VRINGS]
        wait_equal(lambda: [ring.used_idx for ring in rings], [ring.avail_idx for ring in rings])

    def send_more(self) -> None:
        for ring in self.ring_list[TRANSMITQ::VRINGS]:
            ring.send(0, frame(0))

    def replace_memory(self) -> None:
        """Map guest memory anew, as a new memory table does."""
        before, self.memory = self.memory, GuestMemory(self.memory.regions)
        before.close()
        for ring in self.ring_list:
            ring.memory = self.memory

    def close(self) -> None:
        self.faults.clear()
        self.owners.hand_to(Owner.NOBODY, self.rings)
        self.owners.abandon()
        self.check(Owner.NOBODY)
        for worker in self.workers:
            worker.close()
        self.stepped.close()
        self.notifiers.close()
        for log in self.logs:
            log.close()
        self.endpoint.close()
        self.memory.close()


@contextmanager
def bed_of(workers: int = 1, endpoint: Endpoint | None = None) -> Iterator[Bed]:
    bed = Bed(workers, endpoint)
    try:
        yield bed
    finally:
        bed.close()
