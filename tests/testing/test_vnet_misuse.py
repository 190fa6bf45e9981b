"""A Vnet refuses at once, in one line, a use that proves nothing or would only run into its patience."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.testing.test_vnet import QUIET_S, Back, Odd, kill_its_worker
from vnetdp import ConfigError, Endpoint, Fault, Faults, Owner
from vnetdp.errors import WorkError
from vnetdp.testing import Vnet


def test_a_fault_that_never_struck_is_an_error() -> None:
    with pytest.raises(AssertionError, match="the fault set_log:#99 never struck"), Vnet(Back, faults=["set_log:#99"]):
        pass


def test_an_owner_that_never_had_the_rings_is_an_error() -> None:
    """The worker that is killed has nothing to lose, so that the test proves nothing."""
    with pytest.raises(AssertionError) as caught, Vnet(Back, owner="process") as vnet:
        kill_its_worker(vnet)
    assert str(caught.value).startswith(
        "owner='process' never had the rings, and nothing is proven of it: a worker process"
    )
    with Vnet(Back, owner="process", faults=["set_backend"]):
        pass


def test_a_fault_strikes_from_the_start_on() -> None:
    with Vnet(Back, faults=["set_backend"]) as vnet:
        assert vnet.device.owner is Owner.USERSPACE
        vnet.wait_for(10)


SHARED = Fault("set_backend")


@pytest.mark.vnet(endpoint=Back, owner=["thread", "vhost-user"], faults=[SHARED])
def test_a_fault_of_several_tests_strikes_in_each(vnet: Vnet) -> None:
    assert (vnet.faults[0].hits, SHARED.hits) == (1, 0)
    assert [fault.hits for fault in vnet.faults] == [1]
    assert any(event.get("error") == "EIO" for event in vnet.history.events)
    with pytest.raises(AttributeError, match="faults"):
        vnet.faults = Faults()  # type: ignore[misc]


def test_a_fault_of_a_ring_that_is_not_there_is_refused() -> None:
    for fault in (Fault("set_backend", 2), "set_backend:2"):
        with pytest.raises(ConfigError, match=r"its ring is none of 0,0 to 1,1 \(PAIR,VRING\) with pairs=2"):
            Vnet(Back, pairs=2, faults=[fault])
    with pytest.raises(ConfigError, match=r"index 2 is not None, 0 \(receiveq\) or 1 \(transmitq\)"):
        Fault.parse("set_backend:0,2")
    with pytest.raises(ConfigError, match=r"a fault is \[PHASE\.\]VERB\[:PAIR\[,VRING\]\]"):
        Fault.parse("set_backend:0,2")


def test_a_back_end_in_a_process_wants_a_class_that_can_be_imported() -> None:
    class Local(Back):
        pass

    for made in (Local, Local()):
        with pytest.raises(ConfigError, match="class"), Vnet(made, owner="vhost-user"):
            pass
        if isinstance(made, Endpoint):
            made.close()


def test_an_owner_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="userspace, thread, process, vhost-user"):
        Vnet(owner="kernel")
    with pytest.raises(ConfigError, match="owner 'thread' has none"):
        Vnet(back_end="/run/s")


class ForgetsSuper(Back):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"endpoint": "echo"}, "endpoint='echo' is none: give an Endpoint, its class or a function that returns it"),
        ({"endpoint": 7}, "endpoint=7 is none"),
        ({"endpoint": lambda: 7}, "returned 7: an endpoint is an object of a subclass of vnetdp.Endpoint"),
        ({"endpoint": ForgetsSuper}, r"ForgetsSuper.__init__ does not call super\(\).__init__\(\)"),
        ({"endpoint": Odd}, r"endpoint: Odd\(\) is called: missing a required argument: 'what'; give a function"),
        ({"endpoint": Back, "pairs": "2"}, "pairs='2' is not a whole number"),
        (
            {"endpoint": ForgetsSuper, "pairs": 2},
            r"ForgetsSuper\(2\) is called, with the number of queue pairs: too many",
        ),
        ({"features": 1.5}, "features=1.5 are none"),
        ({"rate": "fast"}, "rate='fast' is not a number"),
        ({"faults": 7}, "faults=7 are none: give a Fault, its text, or several"),
        ({"owner": "vhost-user", "back_end": 7}, "back_end=7 is no path"),
        ({"owner": "vhost-user", "back_end": Path("/nowhere/s")}, "its folder /nowhere does not exist"),
        ({"patience_s": 1.0}, "quiet_s=5 is not between 0 and patience_s=1"),
        ({"size": 1515}, "size=1515: with mtu=1500 a frame has up to 1514 bytes"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said), Vnet(**arguments):
        pass


def test_an_endpoint_serves_one_vnet_at_a_time() -> None:
    with Back() as back, Vnet(back) as vnet:
        vnet.wait_for(1)
        with pytest.raises(ConfigError, match="back serves another device: give each Vnet an endpoint of its own"):
            Vnet(back).__enter__()
        with pytest.raises(ConfigError, match="the Vnet is open already"):
            vnet.__enter__()
    with pytest.raises(ConfigError, match="back is closed: give each test an endpoint of its own"), Vnet(back):
        pass


class TooLong(Back):
    def frame_received(self, frame: bytes, queue: int) -> bytes:
        return frame + bytes(70_000)


def test_a_wait_in_vain_has_the_endpoint_s_counters() -> None:
    with pytest.raises(AssertionError) as caught, Vnet(TooLong, faults="unbind") as vnet:
        vnet.wait_until(lambda: bool(vnet._findings.drops()), "frames are dropped")
        vnet.stop()
        vnet.wait_until(lambda: vnet._taken() and vnet.endpoint.idle, "no frame is in hand")
        vnet._patience_s = 0.1
        vnet.wait_for(1)
    assert re.search("1 more frames arrive\nthe endpoint's own counters: dropped_[a-z]+ [1-9]", str(caught.value))


def test_a_wait_after_the_device_was_closed_does_not_blame_the_endpoint() -> None:
    with (
        pytest.raises(AssertionError, match="nobody runs the rings") as caught,
        Vnet(Back, patience_s=0.5, quiet_s=QUIET_S) as vnet,
    ):
        vnet.device.close()
        vnet.wait_for(1 << 40)
    assert "sent no frame back" not in str(caught.value)


def test_outside_its_block_a_vnet_says_so() -> None:
    vnet = Vnet(Back)
    for use in (vnet.settle, vnet.check, vnet.start, vnet.stop, lambda: vnet.wait_for(1), vnet.change_owner):
        with pytest.raises(ConfigError, match="the Vnet is not open: use it in its with block"):
            use()
    with pytest.raises(AttributeError, match=r"Vnet\.device is there in the with block only"):
        _ = vnet.device
    with vnet:
        pass
    with pytest.raises(ConfigError, match="not open"):
        vnet.wait_for(1)


def test_numbers_of_numpy_are_numbers_too() -> None:
    with Vnet(Back, pairs=np.int64(1), num=np.int64(64), size=np.int64(64), mtu=np.int64(1500)) as vnet:  # type: ignore[arg-type]
        vnet.wait_for(1)


def test_a_call_that_would_wait_in_vain_is_refused() -> None:
    with Vnet(Back, faults=Fault("set_backend")) as vnet:
        with pytest.raises(ConfigError, match=r"wait_for\(-1\): give a number of frames from 0"):
            vnet.wait_for(-1)
        with pytest.raises(ConfigError, match=r"wait_until\(True\): give a function"):
            vnet.wait_until(True, "it happens")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"change_owner\(0\): give a number of changes from 1"):
            vnet.change_owner(0)
        vnet.settle()
        with pytest.raises(ConfigError, match=r"the traffic has been settled, and no frame comes: call start\(\)"):
            vnet.wait_for(1)


ALL_AT_THE_TOP = """
from vnetdp import EchoEndpoint
from vnetdp.testing import BackEndProcess


class Mine(EchoEndpoint):
    pass


BackEndProcess(Mine, {path!r})
"""


def test_a_module_that_starts_a_back_end_when_it_is_imported_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "all_at_the_top.py"
    file.write_text(ALL_AT_THE_TOP.format(path=str(tmp_path / "s")))
    with pytest.raises(
        WorkError, match=r"put all that it runs below `if __name__ == '__main__':` at .*all_at_the_top.py:10"
    ):
        runpy.run_path(str(file), run_name="all_at_the_top")


def test_without_a_worker_a_vnet_says_so() -> None:
    with Vnet(owner="userspace") as vnet:
        with pytest.raises(AttributeError, match=r"Vnet\.worker: owner 'userspace' has none"):
            _ = vnet.worker
        with pytest.raises(ConfigError, match="owner 'userspace' has no other owner to change to"):
            vnet.change_owner()
        with pytest.raises(AttributeError, match="Vnet has no attribute 'wrker'"):
            _ = vnet.wrker  # type: ignore[attr-defined]
