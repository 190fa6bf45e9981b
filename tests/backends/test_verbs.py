"""Verbs are values: the same at every place, recorded at one and replayed at another, with the same answers."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from tests.backends.places import FEATURES, LOW_GPA, Place
from vnetdp.backends import verbs
from vnetdp.backends.base import Backend
from vnetdp.backends.faulty import Faults, FaultyBackend
from vnetdp.backends.names import VERBS
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.verbs import (
    DeviceVerb,
    RingVerb,
    SetBackend,
    SetMtu,
    SetVringAddr,
    SetVringBase,
    SetVringNum,
    Verb,
)
from vnetdp.datapath.datapath import Datapath
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import BackendError
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.vhost_user.front_end.pair import VhostUserBackend
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ, VRINGS

KINDS: list[type[Verb]] = [
    kind
    for kind in vars(verbs).values()
    if isinstance(kind, type) and issubclass(kind, DeviceVerb | RingVerb) and kind not in (DeviceVerb, RingVerb)
]
Answer = int | tuple[str, int, int | None]


def answer_of(backend: Backend, verb: Verb) -> Answer:
    """Return what a place answers to a verb: a number, or the verb's name, the errno and the ring of its error."""
    try:
        return backend.apply(verb)
    except BackendError as e:
        return e.verb, e.errno, e.index


class Recording(FaultyBackend):
    """A backend that keeps each verb and its answer."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner, 0, Faults())
        self.record: list[tuple[Verb, Answer]] = []

    def apply(self, verb: Verb) -> int:
        answer = answer_of(self.inner, verb)
        self.record.append((verb, answer))
        return answer if isinstance(answer, int) else -1


def run_all(backend: Backend, place: Place) -> None:
    """Run every verb at *backend*, some of them where they are refused."""
    backend.set_backend(TRANSMITQ, place.endpoint)  # before all that it needs
    backend.set_mtu(0)
    backend.set_mtu(1500)
    backend.set_features(FEATURES)
    backend.set_vring_addr(TRANSMITQ, LOW_GPA, LOW_GPA, LOW_GPA)  # before memory
    backend.set_memory(place.memory)
    backend.set_memory(place.memory)
    backend.set_log(None)
    for index, ring in enumerate(place.rings[0]):
        ring.avail_idx = ring.used_idx = 7
        backend.set_vring_num(index, 3)
        backend.set_vring_num(index, ring.num)
        backend.set_vring_base(index, -1)
        backend.set_vring_base(index, 7)
        backend.set_vring_addr(index, ring.desc + 8, ring.avail, ring.used)
        backend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
        backend.set_vring_kick(index, place.kicks[index])
        backend.set_vring_call(index, place.calls[index])
        backend.set_vring_inflight(index, 0, 0)
        backend.set_vring_enable(index, False)
        backend.set_backend(index, place.endpoint)
        backend.set_vring_base(index, 8)  # bound
        backend.set_features(0)
    backend.set_backend(RECEIVEQ, None)
    for index in range(-1, VRINGS + 1):
        backend.get_vring_base(index)
    backend.set_vring_base(RECEIVEQ, 9)
    backend.get_vring_base(RECEIVEQ)
    backend.set_features(0)


def test_verbs_recorded_at_one_place_have_the_same_answers_at_another(place: Place) -> None:
    datapath = Datapath(1)
    recording = Recording(UserspaceBackend(datapath, 0))
    run_all(recording, place)
    datapath.close()
    assert {type(verb) for verb, _ in recording.record} == set(KINDS)
    answers = [answer for _, answer in recording.record]
    assert {answer for answer in answers if isinstance(answer, int)} == {0, 7, 9}
    refusals = {answer[1] for answer in answers if not isinstance(answer, int)}
    assert refusals == {errno.EBUSY, errno.EFAULT, errno.EINVAL, errno.ENOBUFS}
    other = place.backends[0]
    assert [answer_of(other, verb) for verb, _ in recording.record] == answers


def test_a_remote_back_end_that_is_not_there_refuses_by_the_same_rules(tmp_path: Path) -> None:
    front_end, datapath = VhostUserFrontEnd(str(tmp_path / "s")), Datapath(1)
    refused: dict[Verb, int] = {
        SetMtu(67): errno.EINVAL,
        SetVringNum(RECEIVEQ, 3): errno.EINVAL,
        SetVringNum(VRINGS, 16): errno.ENOBUFS,
        SetVringBase(TRANSMITQ, 0x10000): errno.EINVAL,
        SetVringAddr(TRANSMITQ, 8, 0, 0): errno.EINVAL,
        SetVringAddr(TRANSMITQ, 1 << 63, 0, 0): errno.EFAULT,
        SetVringAddr(TRANSMITQ, 0, 0x1000, 0x2000): errno.EFAULT,
    }
    with NullEndpoint() as endpoint:
        refused[SetBackend(TRANSMITQ, endpoint)] = errno.EFAULT
        for verb, code in refused.items():
            for backend in (front_end.backends[0], UserspaceBackend(datapath, 0)):
                assert answer_of(backend, verb) == (verb.name, code, verb.index)
    datapath.close()
    front_end.close()


def test_each_place_that_runs_verbs_has_all_of_them() -> None:
    assert list(UserspaceBackend._RUN) == list(VhostUserBackend._RUN) == KINDS


def test_each_verb_has_a_name_of_its_own_and_those_of_a_start_are_in_the_list() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert set(VERBS) <= set(names)
    assert all(callable(getattr(Backend, name)) for name in names)


def test_a_verb_is_a_value() -> None:
    verb = SetVringBase(TRANSMITQ, 5)
    assert verb == pickle.loads(pickle.dumps(verb)) == SetVringBase(TRANSMITQ, base=5)
    assert verb != SetVringBase(RECEIVEQ, 5)
    assert len({verb, SetVringBase(TRANSMITQ, 5)}) == 1
    with pytest.raises(AttributeError):
        verb.base = 6  # type: ignore[misc]
