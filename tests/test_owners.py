"""Owners: vhost is told only what is new, binds all rings or none, and leaves nothing of a start that failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from tests.by_hand import Ring, frame, no_descriptor_leaks, wait_equal, wait_for
from vnetdp import features as f
from vnetdp import vhost_net
from vnetdp.backends.base import RECEIVEQ, TRANSMITQ, VRINGS, Backend
from vnetdp.backends.faulty import Fault, Faults, FaultyBackend, FaultyNotifiers
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.worker import Worker
from vnetdp.datapath import Datapath
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import GenerateEndpoint, NullEndpoint
from vnetdp.errors import BackendError
from vnetdp.memory import DirtyLog, GuestMemory
from vnetdp.owners import Owner, Owners
from vnetdp.virtqueue import Virtqueue
from vnetdp_kernels import layout as lay

T = TypeVar("T")
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

    def _do(self, verb: str, index: int | None, call: Callable[[], T]) -> T:
        self.calls.append((verb, self._pair, index))
        return super()._do(verb, index, call)

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
        self.ring_list: list[Ring] = []
        at = 0
        for _ in range(QUEUES):
            self.ring_list.append(Ring(self.memory, at, NUM, BASE))
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
        assert [bool(w.datapath.ctl[lay.CTL_DOORBELL]) for w in self.workers] == [prepared] * len(self.workers)
        n_vhost = sum(int(worker.datapath.vqs[:, lay.VQ_BOUND].sum()) for worker in self.workers)
        n_userspace = int(self.stepped.vqs[:, lay.VQ_BOUND].sum())
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


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with no_descriptor_leaks(), bed_of(request.param) as bed:
        yield bed


@pytest.fixture
def one() -> Iterator[Bed]:
    with no_descriptor_leaks(), bed_of() as bed:
        yield bed


# --- vhost is told only what is new ---


def test_prepared_twice_is_told_once(bed: Bed) -> None:
    assert bed.owners.prepare(bed.rings)
    assert bed.told() == whole_start()
    for _ in range(2):
        assert bed.owners.prepare(bed.rings)
        assert bed.told() == []
        bed.check(Owner.NOBODY, prepared=True)
    assert bed.owners.hand_to(Owner.VHOST, bed.rings)
    assert bed.told() == of_rings(["set_backend"], *range(QUEUES))
    bed.check(Owner.VHOST)


def _mtu(bed: Bed) -> list[Call]:
    bed.mtu = 9000
    return of_pairs("set_mtu")


def _no_mtu(bed: Bed) -> list[Call]:
    bed.mtu = None
    return []


def _features(bed: Bed) -> list[Call]:
    bed.features |= f.VIRTIO_RING_F_EVENT_IDX
    return of_pairs("set_features")


def _moved(bed: Bed) -> list[Call]:
    ring = Ring(bed.memory, bed.free, NUM, BASE)
    bed.queues[3] = Virtqueue(NUM, ring.desc, ring.avail, ring.used, True, BASE)
    return of_rings(A_RING, 3)


def _resized(bed: Bed) -> list[Call]:
    bed.queues[2].num = NUM // 2
    return of_rings(A_RING, 2)


def _used_elsewhere(bed: Bed) -> list[Call]:
    """One of the three addresses alone."""
    bed.queues[5].used = Ring(bed.memory, bed.free, NUM, BASE).used
    return of_rings(A_RING, 5)


def _index(bed: Bed) -> list[Call]:
    bed.queues[4].last_avail_idx = 7
    return []  # the base waits for the binding


def _disabled(bed: Bed) -> list[Call]:
    bed.queues[1].enabled = False
    return []


def _memory(bed: Bed) -> list[Call]:
    before, bed.memory = bed.memory, GuestMemory(bed.memory.regions)
    before.close()
    for ring in bed.ring_list:
        ring.memory = bed.memory
    calls: list[Call] = []
    for pair in range(PAIRS):
        calls += [("set_memory", pair, None), ("set_log", pair, None)]
        calls += of_rings(A_RING, VRINGS * pair, VRINGS * pair + 1)
    return calls


def _log(bed: Bed) -> list[Call]:
    """A log comes with a feature, and with an address for each used ring."""
    bed.log = bed.new_log()
    bed.features |= f.VHOST_F_LOG_ALL
    return [call for call in whole_start() if call[0] != "set_mtu"]


NEWS: dict[str, Callable[[Bed], list[Call]]] = {
    "mtu": _mtu,
    "no mtu": _no_mtu,
    "features": _features,
    "ring moved": _moved,
    "ring resized": _resized,
    "one address": _used_elsewhere,
    "index": _index,
    "disabled": _disabled,
    "memory": _memory,
    "log": _log,
}


@pytest.mark.parametrize("news", NEWS)
def test_what_is_new_is_told_and_no_more(one: Bed, news: str) -> None:
    assert one.owners.prepare(one.rings)
    one.told()
    expected = NEWS[news](one)
    assert one.owners.prepare(one.rings)
    assert one.told() == expected
    assert one.owners.prepare(one.rings)
    assert one.told() == []
    rows = one.datapath.vqs
    for n, queue in enumerate(one.queues):
        if queue.enabled:
            slots = (lay.VQ_NUM, lay.VQ_DESC_GPA, lay.VQ_AVAIL_GPA, lay.VQ_USED_GPA)
            assert tuple(rows[n, list(slots)].tolist()) == queue.setup
            assert rows[n, lay.VQ_LOG_USED] == (queue.used if one.log else -1)
            assert rows[n, lay.VQ_EVENT_IDX] == int(bool(one.features & f.VIRTIO_RING_F_EVENT_IDX))
    one.owners.abandon()
    one.queues[4].last_avail_idx = BASE
    one.queues[1].enabled = True


def test_a_queue_is_told_when_it_is_enabled(one: Bed) -> None:
    one.queues[2].enabled = one.queues[5].enabled = False
    assert one.owners.prepare(one.rings)
    assert not [call for call in one.told() if call[1:] in ((1, 0), (2, 1))]
    one.queues[5].enabled = True
    assert one.owners.prepare(one.rings)
    assert one.told() == of_rings(A_RING, 5)
    one.vhost_serves()
    assert one.datapath.vqs[:, lay.VQ_BOUND].tolist() == [1, 1, 0, 1, 1, 1]
    assert one.told() == of_rings(["set_backend"], 0, 1, 3, 4, 5)
    assert one.owners.hand_to(Owner.NOBODY, one.rings)
    one.queues[2].enabled = True


@pytest.mark.parametrize("at_once", [False, True])
def test_the_base_is_given_when_the_ring_is_bound(one: Bed, at_once: bool) -> None:
    """One ring went on since it was configured, and one was reset, and set up where it was."""
    one.vhost[0].at_once = at_once
    assert one.owners.prepare(one.rings)
    one.ring_list[1] = Ring(one.memory, one.ring_list[1].desc, NUM, 0x1234)
    one.ring_list[3] = Ring(one.memory, one.ring_list[3].desc, NUM, 0)
    one.queues[1].last_avail_idx, one.queues[3].last_avail_idx = 0x1234, 0
    one.told()
    assert one.owners.prepare(one.rings)
    assert one.told() == []
    for n in (1, 3):
        one.ring_list[n].send(0, frame(n))
    one.vhost_serves()
    if at_once:
        assert one.told() == [("bind_rings", 0, None)]
    else:
        assert one.told() == of_rings(["set_vring_base"], 1, 3) + of_rings(["set_backend"], *range(QUEUES))
    assert one.owners.hand_to(Owner.NOBODY, one.rings)
    assert (one.bases()[1], one.bases()[3]) == (0x1235, 1)


def test_a_start_from_nothing_tells_all_and_binds(bed: Bed) -> None:
    assert bed.owners.hand_to(Owner.VHOST, bed.rings)
    assert bed.told() == whole_start() + of_rings(["set_backend"], *range(QUEUES))
    bed.check(Owner.VHOST)


def test_two_threads_are_not_bound_at_once() -> None:
    with no_descriptor_leaks(), bed_of(workers=2) as bed:
        bed.vhost[0].at_once = True
        bed.vhost_serves()
        assert bed.told() == whole_start() + of_rings(["set_backend"], *range(QUEUES))


# --- given up ---


def test_abandoned_once_or_twice_nothing_is_left(bed: Bed) -> None:
    bed.owners.abandon()
    bed.check(Owner.NOBODY)
    for _ in range(2):
        assert bed.owners.prepare(bed.rings)
        bed.check(Owner.NOBODY, prepared=True)
        assert bed.told() == whole_start()  # nothing is known any more
        for _ in range(2):
            bed.owners.abandon()
            bed.check(Owner.NOBODY)
    assert bed.told() == []
    bed.vhost_serves()
    assert bed.owners.fallbacks == 0


@pytest.mark.parametrize("prepares", [1, 2])
def test_nobody_does_not_undo_what_is_prepared_but_userspace_does(bed: Bed, prepares: int) -> None:
    for _ in range(prepares):
        assert bed.owners.prepare(bed.rings)
    assert bed.owners.hand_to(Owner.NOBODY, bed.rings)
    bed.check(Owner.NOBODY, prepared=True)
    assert bed.owners.hand_to(Owner.USERSPACE, bed.rings)
    bed.check(Owner.USERSPACE)
    assert bed.stepped.run()[1] == PAIRS * FRAMES
    bed.vhost_serves()


def test_another_thread_may_bind_what_was_prepared(one: Bed) -> None:
    assert one.owners.prepare(one.rings)
    thread = threading.Thread(target=one.vhost_serves)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    one.check(Owner.VHOST)
    assert one.owners.hand_to(Owner.NOBODY, one.rings)  # this thread may stop the worker, too


def test_what_somebody_else_bound_is_taken_as_bound(one: Bed) -> None:
    assert one.owners.prepare(one.rings)
    for n in range(QUEUES):
        one.vhost[n // VRINGS].set_backend(n % VRINGS, one.endpoint)
    one.owners.take_as_bound()
    one.check(Owner.VHOST)
    one.wait_until_sent()
    assert one.owners.hand_to(Owner.NOBODY, one.rings)
    one.check(Owner.NOBODY)


# --- failures ---


def places(verb: str) -> list[tuple[int, int | None]]:
    """Return (pair, ring) of every place where a verb, or a notifier, can fail."""
    if verb == "set_guest_notifiers":
        return [(0, None)]
    if verb in (*A_DEVICE, "grab_ioeventfd"):
        return [(pair, None) for pair in range(PAIRS)]
    return [divmod(n, VRINGS) for n in range(QUEUES)]


def assert_failed(bed: Bed, verb: str, bases: list[int], fallbacks: int) -> None:
    """It failed there, nothing is left of it, and each index is what it was."""
    error = bed.owners.last_error
    assert isinstance(error, BackendError)
    assert error.verb == verb
    assert bed.owners.fallbacks == fallbacks + 1
    assert [fault.hits for fault in bed.faults][:1] == [1]
    assert bed.bases() == bases
    bed.check(Owner.NOBODY)
    bed.faults.clear()


@pytest.mark.parametrize("verb", [*NOTIFIERS, *A_DEVICE, *A_RING])
def test_a_failure_while_preparing_leaves_nothing(bed: Bed, verb: str) -> None:
    for place in places(verb):
        bases, content, fallbacks = bed.bases(), bed.content(), bed.owners.fallbacks
        bed.faults.append(Fault(verb, *place))
        assert not bed.owners.prepare(bed.rings)
        assert bed.content() == content
        assert_failed(bed, verb, bases, fallbacks)
        bed.send_more()
        assert bed.owners.prepare(bed.rings)
        bed.vhost_serves()
        assert bed.owners.hand_to(Owner.NOBODY, bed.rings)


@pytest.mark.parametrize("verb", [*A_DEVICE, *A_RING])
def test_a_failure_while_something_new_is_told_leaves_nothing(one: Bed, verb: str) -> None:
    for n, place in enumerate(places(verb)):
        assert one.owners.prepare(one.rings)
        one.mtu, one.log = 1400 + n, one.new_log()
        one.features = one.features ^ f.VIRTIO_RING_F_INDIRECT_DESC | f.VHOST_F_LOG_ALL
        bases, content, fallbacks = one.bases(), one.content(), one.owners.fallbacks
        one.faults.append(Fault(verb, *place))
        assert not one.owners.prepare(one.rings)
        assert one.content() == content
        assert_failed(one, verb, bases, fallbacks)
        one.send_more()
        one.vhost_serves()  # from the beginning
        assert one.owners.hand_to(Owner.NOBODY, one.rings)


# What else fails while that is undone.
UNDOING = ("", "get_vring_base", "unbind", "unset_guest_notifiers")


@pytest.mark.parametrize("undoing", UNDOING)
@pytest.mark.parametrize("verb", ["set_vring_base", "set_backend"])
def test_a_failure_while_binding_leaves_nothing(bed: Bed, verb: str, undoing: str) -> None:
    """The indices have moved since they were configured; those of another time are never given back."""
    for place in places(verb):
        final = bed.bases()
        for queue in bed.queues:
            queue.last_avail_idx = 0x4321
        assert bed.owners.prepare(bed.rings)
        for queue, base in zip(bed.queues, final, strict=True):
            queue.last_avail_idx = base
        for ring in bed.ring_list:
            ring.used_flags = 0  # which is all that binding itself writes
        content, fallbacks = bed.content(), bed.owners.fallbacks
        bed.faults.append(Fault(verb, *place))
        if undoing:
            bed.faults.append(Fault(undoing, times=-1))
        bed.told()
        assert not bed.owners.hand_to(Owner.VHOST, bed.rings)
        asked = [call for call in bed.told() if call[0] == "get_vring_base"]
        n_bound = VRINGS * place[0] + (place[1] or 0) if verb == "set_backend" else 0
        assert asked == of_rings(["get_vring_base"], *reversed(range(n_bound)))  # those that were bound, in reverse
        assert bed.content() == content
        assert_failed(bed, verb, final, fallbacks)
        bed.send_more()
        bed.vhost_serves()
        assert bed.owners.hand_to(Owner.NOBODY, bed.rings)


@pytest.mark.parametrize("undoing", UNDOING)
@pytest.mark.parametrize("verb", [*NOTIFIERS, *A_DEVICE, *A_RING, "set_backend"])
def test_a_start_that_fails_leaves_the_rings_to_userspace(one: Bed, verb: str, undoing: str) -> None:
    """From nothing, or from userspace, which then gets them back."""
    for place in places(verb):
        assert one.owners.hand_to(Owner.USERSPACE, one.rings)
        one.stepped.run()
        bases, fallbacks = one.used(), one.owners.fallbacks
        one.send_more()
        one.faults.append(Fault(verb, *place))
        if undoing:
            one.faults.append(Fault(undoing, times=-1))
        assert not one.owners.hand_to(Owner.VHOST, one.rings)
        assert_failed(one, verb, bases, fallbacks)
        assert one.owners.hand_to(Owner.USERSPACE, one.rings)
        one.check(Owner.USERSPACE)
        assert one.stepped.run()[1] == PAIRS
        one.send_more()
        one.vhost_serves()


# --- while it is prepared ---


def test_while_prepared_nobody_writes_or_takes_a_frame() -> None:
    """I5: kicked, and with frames on the wire, vhost does nothing until it is bound; then it does all of it."""
    with no_descriptor_leaks(), bed_of(endpoint=GenerateEndpoint(PAIRS, 64, 0.0, FRAMES)) as bed:
        assert isinstance(bed.endpoint, GenerateEndpoint)
        bed.log, bed.features = bed.new_log(), bed.features | f.VHOST_F_LOG_ALL
        content, rows = bed.content(), bed.endpoint.rows.copy()
        passes = -1
        for n in range(3):
            if n == 2:
                bed.mtu, bed.features = 9000, bed.features | f.VIRTIO_RING_F_INDIRECT_DESC
            assert bed.owners.prepare(bed.rings)
            for kick in bed.notifiers.kicks:
                kick.signal()
            bed.datapath.bell.signal()
            assert n == 0 or bed.datapath.ctl[lay.CTL_PASSES] == passes
            passes = int(bed.datapath.ctl[lay.CTL_PASSES])
            time.sleep(0.03)
            assert bed.datapath.ctl[lay.CTL_PASSES] == passes
            assert bed.stepped.run()[1] == 0
            assert bed.content() == content
            assert np.array_equal(bed.endpoint.rows, rows)
            assert bed.endpoint.sent == 0
            assert bed.log.pages() == []
            assert [call.clear() for call in bed.notifiers.calls] == [0] * QUEUES
            bed.check(Owner.NOBODY, prepared=True)
        bed.vhost_serves()
        wait_equal(bed.used, [(BASE + FRAMES) & 0xFFFF] * QUEUES)
        for call in bed.notifiers.calls:
            wait_for(lambda call=call: bool(call.clear()), "I9")  # type: ignore[misc]
        assert bed.endpoint.sent == PAIRS * FRAMES
        assert bed.log.pages()


# --- all rings at once ---


@contextmanager
def bound(at_once: bool, features: int, logged: bool, disabled: Sequence[int], seed: int) -> Iterator[Bed]:
    """A bed whose rings, left by somebody else in any state, are bound to a worker that stands still."""
    random = np.random.default_rng(seed)
    with bed_of() as bed:
        early, final = random.integers(0, 1 << 16, (2, QUEUES)).tolist()
        final[0] = early[0]  # this one has not moved
        bed.vhost[0].at_once = at_once
        bed.features = features
        if logged:
            bed.log, bed.features = bed.new_log(), features | f.VHOST_F_LOG_ALL
        for n in disabled:
            bed.queues[n].enabled = False
        prepared = vhost_net.Prepared()
        with vhost_net.standing_still(bed.vhost):
            for queue, index in zip(bed.queues, early, strict=True):
                queue.last_avail_idx = index
            vhost_net.configure(bed.vhost, bed.rings, prepared)
            for ring, queue, index in zip(bed.ring_list, bed.queues, final, strict=True):
                queue.last_avail_idx = ring.used_idx = index
                ring.avail_idx = index + FRAMES
                ring.used_flags = 1
            rows = bed.datapath.vqs
            rows[:, lay.VQ_STATUS] = lay.E_HEAD
            rows[:, lay.VQ_SIGNALLED_USED], rows[:, lay.VQ_SIGNALLED_USED_VALID] = 77, 1
            rows[:, lay.VQ_CALL_DUE] = rows[:, lay.VQ_KICKS_ON] = 0
            rows[:, lay.VQ_LAST_USED_IDX] = 99
            bed.endpoint.rows[:, lay.EP_GONE] = 1
            bed.told()
            vhost_net.bind(bed.vhost, bed.rings, prepared, one_site=True)
            yield bed
            vhost_net.stop(bed.vhost, bed.rings)
        assert [queue.last_avail_idx for queue in bed.queues] == final
        for queue, ring in zip(bed.queues, bed.ring_list, strict=True):
            queue.enabled = True
            queue.last_avail_idx = ring.used_idx


@pytest.mark.parametrize("disabled", [(), (2,), (0, 1, 5)])
@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_all_at_once_is_the_same_as_verb_by_verb(event_idx: bool, logged: bool, disabled: tuple[int, ...]) -> None:
    features = FEATURES | (f.VIRTIO_RING_F_EVENT_IDX if event_idx else 0)
    with no_descriptor_leaks():
        for seed in range(3):
            args = (features, logged, disabled, seed)
            with bound(True, *args) as one, bound(False, *args) as other:
                enabled = [n for n in range(QUEUES) if n not in disabled]
                moved = [n for n in enabled if n != 0]
                verbs = of_rings(["set_vring_base"], *moved) + of_rings(["set_backend"], *enabled)
                assert (one.told(), other.told()) == ([("bind_rings", 0, None)], verbs)
                different = np.argwhere(one.datapath.vqs != other.datapath.vqs)
                assert different.tolist() == []  # (queue, column)
                assert one.content() == other.content()
                assert np.array_equal(one.endpoint.rows, other.endpoint.rows)
                assert (one.datapath.endpoint, other.datapath.endpoint) == (one.endpoint, other.endpoint)
                assert [*one.endpoint.polled_by] == [*other.endpoint.polled_by]
                assert set(one.endpoint.polled_by.values()) == {one.datapath}
                assert one.endpoint.polls_started == other.endpoint.polls_started
                if one.log and other.log:
                    assert one.log.pages() == other.log.pages()
                # And it is what binding has to do, not the same of nothing.
                rows = one.datapath.vqs[enabled]
                assert rows[:, lay.VQ_LAST_AVAIL_IDX].tolist() == [one.bases()[n] for n in enabled]
                assert rows[:, lay.VQ_LAST_USED_IDX].tolist() == [one.used()[n] for n in enabled]
                assert rows[:, lay.VQ_BOUND].all()
                assert [ring.used_flags for ring in one.ring_list] == [
                    int(event_idx or n in disabled) for n in range(QUEUES)
                ]


def _other_endpoint(bed: Bed) -> None:
    other = NullEndpoint(PAIRS)
    bed.vhost[2].set_backend(0, other)


def _same_endpoint(bed: Bed) -> None:
    bed.vhost[2].set_backend(0, bed.endpoint)


def _few_queues(bed: Bed) -> None:
    bed.endpoint.close()
    bed.endpoint = NullEndpoint(PAIRS - 1)


def _new_size(bed: Bed) -> None:
    bed.vhost[1].set_vring_num(RECEIVEQ, NUM)


def _new_table(bed: Bed) -> None:
    _memory(bed)
    bed.vhost[0].set_memory(bed.memory)


def _polled(bed: Bed) -> None:
    bed.endpoint.start_polling(1, bed)


# What is in the way, and the verb that says so when the rings are bound one by one (None: it is not in its way).
IN_THE_WAY: dict[str, tuple[Callable[[Bed], None], str | None]] = {
    "another endpoint is bound": (_other_endpoint, "another endpoint is bound"),
    "a ring is bound already": (_same_endpoint, None),
    "a pair has no queue of the endpoint": (_few_queues, "has 2 queues"),
    "a ring has a new size": (_new_size, None),
    "there is a new table": (_new_table, None),
    "a queue is polled": (_polled, "polled by another owner"),
}


@pytest.mark.parametrize("reason", IN_THE_WAY)
def test_rings_are_not_bound_at_once_when_something_is_in_the_way(reason: str) -> None:
    get_in_the_way, error = IN_THE_WAY[reason]
    with no_descriptor_leaks(), bed_of() as bed:
        prepared = vhost_net.Prepared()
        bed.vhost[0].at_once = True
        rows, endpoint = bed.datapath.vqs, None
        with vhost_net.standing_still(bed.vhost):
            vhost_net.configure(bed.vhost, bed.rings, prepared)
            get_in_the_way(bed)
            endpoint = bed.datapath.endpoint
            wanted = list(enumerate(bed.bases()))

            def state() -> list[Any]:
                ends = [
                    (e.rows.tolist(), {**e.polled_by}, e.polls_started, e.polls_stopped)
                    for e in (bed.endpoint, endpoint)
                ]
                return [rows.tolist(), bed.content(), bed.datapath.endpoint, *ends]

            before = state()
            for index in range(PAIRS):
                assert bed.vhost[index].bind_rings(wanted, bed.endpoint) is False
            assert state() == before
            bed.told()
            if error is None:
                vhost_net.bind(bed.vhost, bed.rings, prepared, one_site=True)
                assert bed.told() == [("refused", 0, None), *of_rings(["set_backend"], *range(QUEUES))]
            else:
                with pytest.raises(BackendError, match=error):
                    vhost_net.bind(bed.vhost, bed.rings, prepared, one_site=True)
            vhost_net.stop(bed.vhost, bed.rings)
            bed.endpoint.stop_polling(1, bed)
        if endpoint is not bed.endpoint and endpoint is not bed.datapath.endpoint:
            endpoint.close()


def test_rings_without_memory_are_not_bound_at_once(one: Bed) -> None:
    backend: Backend = one.workers[0].backends[0]
    assert backend.bind_rings([(0, BASE), (1, BASE)], one.endpoint) is False
    assert not one.datapath.vqs[:, lay.VQ_BOUND].any()
    assert not one.endpoint.polled_by
    assert one.datapath.endpoint is not one.endpoint
