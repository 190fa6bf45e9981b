"""Owners: vhost is told only what is new, binds all rings or none, and leaves nothing of a start that failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.support.by_hand import frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.owner_bed import (
    A_DEVICE,
    A_RING,
    BASE,
    FRAMES,
    NOTIFIERS,
    NUM,
    PAIRS,
    QUEUES,
    Bed,
    Call,
    bed_of,
    of_pairs,
    of_rings,
    whole_start,
)
from vnetdp.backends.faulty import Fault
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.errors import BackendError
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import VRINGS, Virtqueue
from vnetdp_kernels import rows as r


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
    ring = HandRing(bed.memory, bed.free, NUM, BASE)
    bed.queues[3] = Virtqueue(NUM, ring.desc, ring.avail, ring.used, True, BASE)
    return of_rings(A_RING, 3)


def _resized(bed: Bed) -> list[Call]:
    bed.queues[2].num = NUM // 2
    return of_rings(A_RING, 2)


def _used_elsewhere(bed: Bed) -> list[Call]:
    """One of the three addresses alone."""
    bed.queues[5].used = HandRing(bed.memory, bed.free, NUM, BASE).used
    return of_rings(A_RING, 5)


def _index(bed: Bed) -> list[Call]:
    bed.queues[4].last_avail_idx = 7
    return []  # the base waits for the binding


def _disabled(bed: Bed) -> list[Call]:
    bed.queues[1].enabled = False
    return []


def _memory(bed: Bed) -> list[Call]:
    bed.replace_memory()
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
            slots = (r.VQ_NUM, r.VQ_DESC_GPA, r.VQ_AVAIL_GPA, r.VQ_USED_GPA)
            assert tuple(rows[n, list(slots)].tolist()) == queue.setup
            assert rows[n, r.VQ_LOG_USED] == (queue.used if one.log else -1)
            assert rows[n, r.VQ_EVENT_IDX] == int(bool(one.features & f.VIRTIO_RING_F_EVENT_IDX))
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
    assert one.datapath.vqs[:, r.VQ_BOUND].tolist() == [1, 1, 0, 1, 1, 1]
    assert one.told() == of_rings(["set_backend"], 0, 1, 3, 4, 5)
    assert one.owners.hand_to(Owner.NOBODY, one.rings)
    one.queues[2].enabled = True


@pytest.mark.parametrize("at_once", [False, True])
def test_the_base_is_given_when_the_ring_is_bound(one: Bed, at_once: bool) -> None:
    """One ring went on since it was configured, and one was reset, and set up where it was."""
    one.vhost[0].at_once = at_once
    assert one.owners.prepare(one.rings)
    one.ring_list[1] = HandRing(one.memory, one.ring_list[1].desc, NUM, 0x1234)
    one.ring_list[3] = HandRing(one.memory, one.ring_list[3].desc, NUM, 0)
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
        n_tried = VRINGS * place[0] + (place[1] or 0) + 1 if verb == "set_backend" else 0
        assert asked == of_rings(["get_vring_base"], *reversed(range(n_tried)))  # those that were tried, in reverse
        assert bed.content() == content
        assert_failed(bed, verb, final, fallbacks)
        bed.send_more()
        bed.vhost_serves()
        assert bed.owners.hand_to(Owner.NOBODY, bed.rings)


@pytest.mark.parametrize("verb", ["set_memory", "set_vring_call", "set_backend"])
@pytest.mark.parametrize("prepares", [True, False])
def test_a_defect_leaves_nothing_either(one: Bed, verb: str, prepares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if prepares and verb == "set_backend":
        assert one.owners.prepare(one.rings)
    bases, content = one.bases(), one.content()

    def overflows(*args: object) -> None:
        if args[-1] is not None:  # to unbind never fails
            raise OverflowError("not foreseen")

    monkeypatch.setattr(one.vhost[1], verb, overflows)
    with pytest.raises(OverflowError, match="not foreseen"):
        if prepares and verb != "set_backend":
            one.owners.prepare(one.rings)
        else:
            one.owners.hand_to(Owner.VHOST, one.rings)
    monkeypatch.undo()
    assert one.bases() == bases
    assert one.content() == content
    one.check(Owner.NOBODY)
    one.vhost_serves()


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
            assert n == 0 or bed.datapath.ctl[r.CTL_PASSES] == passes
            passes = int(bed.datapath.ctl[r.CTL_PASSES])
            time.sleep(0.03)
            assert bed.datapath.ctl[r.CTL_PASSES] == passes
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
