"""All rings bound at once are as if bound verb by verb; and where that can't be, they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.by_hand import no_descriptor_leaks
from tests.support.owner_bed import BASE, FEATURES, FRAMES, NUM, PAIRS, QUEUES, Bed, bed_of, of_rings
from vnetdp.backends.base import Backend
from vnetdp.device import vhost_net
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import BackendError
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ
from vnetdp_kernels import rows as r


@pytest.fixture
def one() -> Iterator[Bed]:
    with no_descriptor_leaks(), bed_of() as bed:
        yield bed


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
            rows[:, r.VQ_STATUS] = r.E_HEAD
            rows[:, r.VQ_SIGNALLED_USED], rows[:, r.VQ_SIGNALLED_USED_VALID] = 77, 1
            rows[:, r.VQ_CALL_DUE] = rows[:, r.VQ_KICKS_ON] = 0
            rows[:, r.VQ_LAST_USED_IDX] = 99
            bed.endpoint.rows[:, r.EP_GONE] = 1
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
                assert rows[:, r.VQ_LAST_AVAIL_IDX].tolist() == [one.bases()[n] for n in enabled]
                assert rows[:, r.VQ_LAST_USED_IDX].tolist() == [one.used()[n] for n in enabled]
                assert rows[:, r.VQ_BOUND].all()
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
    bed.replace_memory()
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
    assert not one.datapath.vqs[:, r.VQ_BOUND].any()
    assert not one.endpoint.polled_by
    assert one.datapath.endpoint is not one.endpoint
