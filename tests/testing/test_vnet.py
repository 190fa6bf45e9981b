"""Vnet accounts for every frame of an endpoint, whoever has the rings, and names each thing that went wrong."""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.programs.test_drive_serve import served
from tests.support.by_hand import COMPILED, no_descriptor_leaks, scaled, wait_for
from vnetdp import (
    EchoEndpoint,
    Endpoint,
    Fault,
    FrameEndpoint,
    NullEndpoint,
    Owner,
    features,
)
from vnetdp.testing import OWNERS, VERBS, Fate, FrameLedger, Vnet
from vnetdp_kernels import rows as r

MANY = scaled(2000, 100)
QUIET_S = 0.3  # without a frame, where one is lost for good


def number_of(frame: bytes) -> int:
    return int(struct.unpack_from("<Q", frame, r.LEDGER_SEQ_AT)[0])


class Back(FrameEndpoint):
    """It sends each frame back."""

    name = "back"

    def frame_received(self, frame: bytes, queue: int) -> Iterable[bytes] | bytes | None:
        return frame


class Odd(Back):
    """It does something else with the frames whose numbers it is told."""

    name = "odd"

    def __init__(self, what: str, *numbers: int) -> None:
        super().__init__()
        self.what, self.numbers = what, {*numbers}
        self.kept: list[bytes] = []

    def frame_received(self, frame: bytes, queue: int) -> Iterable[bytes] | bytes | None:
        if number_of(frame) not in self.numbers:
            kept, self.kept = self.kept, []
            return [frame, *kept]
        self.numbers.discard(number_of(frame))
        if self.what == "late":
            self.kept.append(frame)
        if self.what == "raises":
            raise ValueError("seven is enough")
        return {"doubled": [frame, frame], "corrupted": [frame[:40] + b"\xff" + frame[41:]]}.get(self.what, [])


# --- nothing is wrong ---

# A worker process refuses an endpoint in Python.
PROVEN = [
    (owner, made) for owner in OWNERS for made in (None, EchoEndpoint, Back) if (owner, made) != ("process", Back)
]


@pytest.mark.parametrize(("owner", "made"), PROVEN)
def test_every_frame_is_accounted_for_under_each_owner_and_its_changes(owner: str, made: type[Endpoint] | None) -> None:
    with no_descriptor_leaks():
        with Vnet(made, owner=owner) as vnet:
            vnet.wait_for(MANY)
            assert vnet.device.owner is (Owner.USERSPACE if owner == "userspace" else Owner.VHOST)
            if owner != "userspace":
                vnet.change_owner(5)
                vnet.wait_for(MANY)
        assert vnet.ledger.fates == []
        assert vnet.ledger.counts.clean or (made is Back and owner == "vhost-user")  # which has another of its own


def test_several_pairs_and_chosen_features() -> None:
    with Vnet(Back, pairs=3, num=16, features="-event_idx,-indirect_desc", size=1000, rate=5000.0) as vnet:
        vnet.wait_for(scaled(200, 20))
        assert not vnet.driver.features & (features.VIRTIO_RING_F_EVENT_IDX | features.VIRTIO_RING_F_INDIRECT_DESC)
        assert vnet.endpoint.queues == 3


def test_traffic_stops_is_checked_and_goes_on() -> None:
    with Vnet(Back) as vnet:
        for _ in range(3):
            vnet.wait_for(10)
            vnet.settle()
            assert vnet.ledger.counts.clean
            vnet.start()


@pytest.mark.vnet(endpoint=Back)
@pytest.mark.parametrize("verb", VERBS)
def test_an_endpoint_in_python_survives_each_verb_that_fails(vnet: Vnet, faults: list[Fault], verb: str) -> None:
    faults.append(Fault(verb))
    vnet.change_owner()
    vnet.wait_for(MANY)


@pytest.mark.parametrize(
    ("owner", "made"), [case for case in PROVEN if case[1] is not EchoEndpoint and case[0] != "userspace"]
)
def test_frames_go_on_when_the_worker_is_killed(owner: str, made: type[Endpoint] | None) -> None:
    with Vnet(made, owner=owner) as vnet:
        kill_its_worker(vnet)


def kill_its_worker(vnet: Vnet) -> None:
    vnet.wait_for(MANY)
    vnet.worker.kill()
    vnet.wait_until(lambda: vnet.device.owner is Owner.USERSPACE, "userspace has the rings")
    vnet.wait_for(MANY)


@pytest.mark.vnet(endpoint=Back, owner="vhost-user")
def test_the_next_back_end_gets_the_rings(vnet: Vnet, ledger: FrameLedger) -> None:
    vnet.wait_for(MANY)
    vnet.worker.kill()
    vnet.wait_for(MANY)
    vnet.worker.restart()  # type: ignore[union-attr]
    vnet.wait_until(lambda: vnet.device.owner is Owner.VHOST, "vhost has the rings again")
    vnet.wait_for(MANY)
    assert ledger.fates == []


def test_a_back_end_of_ones_own_is_tested_as_well(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        EchoEndpoint() as wire,
        served(wire, path),
        Vnet(EchoEndpoint, owner="vhost-user", back_end=str(path)) as vnet,
    ):
        vnet.wait_for(MANY)
        assert vnet.device.owner is Owner.VHOST
        vnet.change_owner()
        assert vnet.device.owner is Owner.VHOST
        vnet.wait_for(MANY)


# --- which frames ---


def fates(vnet: Vnet) -> list[tuple[str, int, int, str]]:
    return [(fate.kind, fate.number, fate.index, fate.owner) for fate in vnet.ledger.fates]


@pytest.mark.parametrize("kind", ["lost", "doubled", "late", "corrupted"])
def test_a_frame_that_is_not_as_it_should_be_is_named(kind: str) -> None:
    with Odd(kind, 7) as odd, pytest.raises(AssertionError) as caught, Vnet(odd, quiet_s=QUIET_S) as vnet:
        vnet.wait_until(lambda: number_seen(vnet) > 20, "the frame is past")
        vnet.settle()
    seen = [fate for fate in fates(vnet) if fate[0] == kind]
    assert seen == [(kind, 7, 7, "vhost (thread)")]
    assert kind != "corrupted" or fates(vnet) == seen
    words = {"lost": "was lost", "doubled": "came twice", "late": "came late", "corrupted": "came damaged"}[kind]
    where = "avail index 7 of queue 1, taken by vhost (thread); noticed at "
    assert f"frame 7 of pair 0 (guest to wire and back) {words}: {where}" in str(caught.value)


def number_seen(vnet: Vnet) -> int:
    return int(vnet.guest.ledger[0, r.LEDGER_NEXT])


class Loses(Endpoint):
    """It sends each frame back but for one in 10,000."""

    name = "loses"

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.waiting: list[bytes] = []

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        for frame in frames:
            self.seen += 1
            if self.seen % 10_000:
                self.waiting.append(frame)
        self.wake(queue)

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        frames, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return frames


@pytest.mark.skipif(not COMPILED, reason="plain Python is too slow for so many frames")
def test_the_index_wraps_and_the_owner_is_that_of_the_index() -> None:
    """One frame in 10,000 is lost; the rings change hands between."""
    lost = range(9_999, 70_000, 10_000)
    with (
        pytest.raises(AssertionError, match=r"frame 9999 .* avail index 9999 of queue 1, taken by vhost"),
        Vnet(Loses, quiet_s=QUIET_S) as vnet,
    ):
        vnet.wait_until(lambda: number_seen(vnet) > 10_000, "the first one is past")
        vnet.change_owner(1)
        first = number_seen(vnet)
        vnet.wait_until(lambda: number_seen(vnet) > 70_000, "the last one is past")
    owners = dict.fromkeys(range(9_999, first, 10_000), "vhost (thread)")
    assert fates(vnet) == [("lost", n, n & 0xFFFF, owners.get(n, "userspace")) for n in lost]


def test_frames_that_are_lost_at_the_end_are_named_too() -> None:
    with (
        Odd("lost", *range(5, 1 << 16)) as odd,
        pytest.raises(AssertionError, match="frame 5 of pair 0"),
        Vnet(odd, rate=1000.0, quiet_s=QUIET_S) as vnet,
    ):
        vnet.wait_until(lambda: vnet.guest.sent > 20, "frames are sent")
    assert [fate.number for fate in vnet.ledger.fates][:3] == [5, 6, 7]


def test_the_first_hundred_frames_are_named_and_all_are_counted() -> None:
    with Odd("doubled", *range(300)) as odd, pytest.raises(AssertionError) as caught, Vnet(odd) as vnet:
        vnet.wait_until(lambda: number_seen(vnet) > 300, "all are past")
    assert [fate.number for fate in vnet.ledger.fates] == [*range(100)]
    assert "and 90 more frames" in str(caught.value)
    assert "200 more frames of pair 0 (guest to wire and back) came twice" in str(caught.value)
    assert vnet.ledger.counts.duplicated == 300


# --- the endpoint ---


def test_an_exception_in_the_endpoint_fails_the_test_at_once_with_its_place() -> None:
    with Odd("raises", 7) as odd, pytest.raises(AssertionError) as caught, Vnet(odd) as vnet:
        vnet.wait_for(1 << 40)
    assert re.search(
        r"the endpoint raised 1 time, the last time: ValueError: seven is enough at .*test_vnet.py:\d+",
        str(caught.value),
    )


def test_an_endpoint_may_raise_and_drop_frames_if_the_test_says_so() -> None:
    with Odd("raises", 7) as odd, Vnet(odd, returns=False, raises=True) as vnet:
        vnet.wait_until(lambda: odd.errors == 1, "it raised")
        vnet.wait_for(MANY)
    with Vnet(NullEndpoint) as vnet:
        vnet.wait_for(MANY)


class Hangs(Back):
    """It hangs in the frame that comes after *from_now* is set."""

    name = "hangs"

    def __init__(self) -> None:
        super().__init__()
        self.from_now = threading.Event()
        self.hanging = threading.Event()
        self.may_return = threading.Event()

    def frame_received(self, frame: bytes, queue: int) -> bytes:
        if self.from_now.is_set():
            self.hanging.set()
            self.may_return.wait()
        return frame


def test_an_endpoint_that_hangs_does_not_hang_a_change_of_owner() -> None:
    with Hangs() as hangs:
        vnet = Vnet(hangs, quiet_s=QUIET_S)
        with pytest.raises(AssertionError, match="hangs hangs in frame_received"), vnet:
            hangs.from_now.set()
            vnet.wait_until(hangs.hanging.is_set, "it hangs")
            vnet._patience_s = vnet._findings.hang._patience_s = 0.5
            vnet.change_owner()
        hangs.may_return.set()
        wait_for(lambda: not hangs._in_hand, "it comes back")
        vnet.close()


@pytest.mark.parametrize("within", [True, False])
def test_an_endpoint_that_hangs_is_named_with_its_line_and_does_not_hang_the_test(within: bool) -> None:
    with no_descriptor_leaks(), Hangs() as hangs:
        vnet = Vnet(hangs, owner="userspace", quiet_s=QUIET_S)
        with pytest.raises(AssertionError) as caught, vnet:
            vnet.wait_for(10)
            hangs.from_now.set()
            vnet.wait_until(hangs.hanging.is_set, "it hangs")
            vnet._patience_s = vnet._findings.hang._patience_s = 0.5
            if within:
                vnet.wait_for(1 << 40)
        said = r"hangs hangs in frame_received at .*test_vnet.py:\d+: it has not come back for 0.5 s; let it return"
        assert re.search(said, str(caught.value))
        assert ("never happened" in str(caught.value)) is within
        hangs.may_return.set()
        wait_for(lambda: not hangs._in_hand, "it comes back")
        vnet.close()


class HangsAfterTwenty(Back):
    """It hangs in its twenty-first frame."""

    name = "hangs"
    seen = 0

    def frame_received(self, frame: bytes, queue: int) -> bytes:
        self.seen += 1
        if self.seen > 20:
            threading.Event().wait()
        return frame


def test_an_endpoint_that_hangs_in_its_back_end_is_named_with_its_line() -> None:
    vnet = Vnet(HangsAfterTwenty, owner="vhost-user", patience_s=0.5, quiet_s=QUIET_S)
    with pytest.raises(AssertionError) as caught, vnet:
        try:
            vnet.wait_for(1 << 40)
        finally:
            vnet.worker.kill()  # or the rings are waited for
    assert re.search(
        r"in the back end's process: hangs hangs in frame_received at .*test_vnet.py:\d+: let it", str(caught.value)
    )


class SendsNothing(FrameEndpoint):
    name = "nothing"


def test_an_endpoint_that_sends_no_frame_back_is_told_from_one_that_loses_some() -> None:
    with pytest.raises(AssertionError) as caught, Vnet(SendsNothing, patience_s=0.5, quiet_s=QUIET_S) as vnet:
        vnet.wait_for(1)
    assert "nothing has sent no frame back: let it send back each, or give returns=False" in str(caught.value)


def test_an_error_of_the_test_itself_is_kept_and_has_the_state_of_the_device() -> None:
    with pytest.raises(KeyError) as caught, Vnet(Back) as vnet:
        vnet.wait_for(1)
        raise KeyError("mine")
    (note,) = caught.value.__notes__
    assert note.startswith("[back after ")
    assert "owner vhost (thread)" in note


# --- the history ---


def test_a_history_has_verbs_owners_and_frames_as_json_lines() -> None:
    with Odd("doubled", 3) as odd, pytest.raises(AssertionError), Vnet(odd, faults=["get_vring_base"]) as vnet:
        vnet.wait_until(lambda: number_seen(vnet) > 3, "it is past")
        vnet.change_owner()
    events = [json.loads(line) for line in vnet.history.lines().splitlines()]
    assert [event["at_s"] for event in events] == sorted(event["at_s"] for event in events)
    verbs = [(event["verb"], event["error"]) for event in events if event["event"] == "verb"]
    assert verbs[:3] == [("set_mtu", None), ("set_features", None), ("set_memory", None)]
    assert ("get_vring_base", "EIO") in verbs
    owners = [event["owner"] for event in events if event["event"] == "owner"]
    assert owners[:4] == ["vhost (thread)", "nobody", "userspace", "nobody"]
    frames = [
        Fate(**{k: v for k, v in event.items() if k not in ("event", "at_s")})
        for event in events
        if event["event"] == "frame"
    ]
    assert [(frame.kind, frame.number) for frame in frames] == [("doubled", 3)]
