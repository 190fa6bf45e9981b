"""`vnetdp migrate` and `vnetdp faults`, run as their user runs them: exit status, what they print and what they write."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import shell
from tests.support.shell import Shell
from vnetdp.backends.names import FAULT_POINTS
from vnetdp.lab.matrix import cases

__all__ = ["shell"]  # the fixture

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
MIGRATION = {"policy", "outcome", "error", "ledger", "violations", "spans_us", "destination_us", "blackout_us"}
MIGRATION |= {"bytes", "counts", "migrations"}
LEDGER = {"sent", "delivered", "lost", "duplicated", "reordered", "corrupted"}
BOTH_SIDES = {"stop", "log_sync", "first_tx", "first_rx", "resume"}
SPANS = {
    "none": {"save", "load_full", "index_check", "start_vhost"},
    "seed": {"early_save", "early_load", "early_vhost_start", "delta_check", "save", "load_delta", "set_bases"},
    "delta": {"early_save", "early_load", "early_vhost_start", "delta_check", "save", "load_delta", "bind_backends"},
}
ROW = {"id", "says", "outcome", "expected", "violations", "lost", "duplicated", "error", "ok", "traffic", "queue_pairs"}
ROW |= {"hits", "false_deltas", "predicted"}
RATE = ("--rate", "2000")


def migrate(shell: Shell, *args: str, exits: int = 0) -> dict[str, Any]:
    """Run `vnetdp migrate`; return its report, which is all that it prints on standard output."""
    done = shell.run_forked("migrate", *RATE, *args, "--json", "-")
    assert done.returncode == exits, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == MIGRATION
    assert set(report["ledger"]) == LEDGER
    return report


def assert_well(report: dict[str, Any], outcome: str = "vhost") -> None:
    assert (report["outcome"], report["error"], report["violations"]) == (outcome, "", [])
    ledger = report["ledger"]
    assert ledger["sent"] == ledger["delivered"] > 0
    assert not any(ledger[bad] for bad in LEDGER - {"sent", "delivered"})


# --- migrate ---


@pytest.mark.parametrize("policy", SPANS)
def test_a_migration_reports_what_it_did(shell: Shell, policy: str) -> None:
    report = migrate(shell, "--policy", policy)
    assert_well(report)
    assert report["policy"] == policy
    assert set(report["spans_us"]) >= SPANS[policy] | BOTH_SIDES
    assert not {"retry", "unwind"} & set(report["spans_us"])
    assert all(us > 0 for us in report["spans_us"].values())
    assert report["destination_us"] > 0
    assert report["blackout_us"] > 0
    assert set(report["bytes"]) == {"early", "ram", "final"}
    assert all(report["bytes"].values())
    assert (report["counts"]["early"], report["counts"]["hits"]) == (int(policy != "none"), 0)
    assert report["migrations"] == 1


def test_what_is_printed_says_the_same_and_the_timeline_is_drawn(shell: Shell) -> None:
    plot = ("--plot", "timeline.png") if find_spec("matplotlib") else ()
    done = shell.run("migrate", *RATE, "--json", "report.json", *plot)
    report = json.loads((shell.folder / "report.json").read_text())
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "policy delta, outcome vhost"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(report["spans_us"])
    assert lines[-1] == "ledger: " + ", ".join(f"{count:,} {name}" for name, count in report["ledger"].items())
    if plot:
        assert (shell.folder / "timeline.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


FAULTS = [("final.set_backend:0,1:once", "vhost"), ("set_backend:0,1:always", "userspace")]
if CAMPAIGN:
    FAULTS += [("early.set_mtu", "vhost"), ("set_guest_notifiers:always", "userspace")]


@pytest.mark.parametrize(("fault", "outcome"), FAULTS)
def test_a_fault_that_stays_leaves_the_rings_to_userspace(shell: Shell, fault: str, outcome: str) -> None:
    report = migrate(shell, "--fault", fault)
    assert_well(report, outcome)
    assert report["counts"]["hits"] == (1 if outcome == "vhost" else 2)


def test_what_is_undone_and_tried_again_has_its_spans(shell: Shell) -> None:
    spans = migrate(shell, "--fault", "final.set_backend:0,1:once")["spans_us"]
    assert spans["unwind"] > 0
    assert spans["retry"] > 0
    for policy in ("seed", "delta") if CAMPAIGN else ("delta",):
        spans = migrate(shell, "--policy", policy, "--target-userspace")["spans_us"]
        assert not {"early_vhost_start", "retry", "unwind", "start_vhost"} & set(spans)


def test_a_fault_that_does_not_strike_is_exit_status_1(shell: Shell) -> None:
    done = shell.run_forked("migrate", *RATE, "--fault", "get_vring_base")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "no verb of --fault was called: get_vring_base"


def test_a_machine_without_packets_has_no_longest_time_without(shell: Shell) -> None:
    done = shell.run_forked("migrate", "--traffic", "idle", "--json", "report.json")
    assert done.returncode == 0
    assert "no packet moved after the stop" in done.stdout
    assert json.loads((shell.folder / "report.json").read_text())["blackout_us"] is None


def test_a_fault_at_the_source_strikes_there(shell: Shell) -> None:
    report = migrate(shell, "--fault", "source:set_log", exits=1)
    assert report["outcome"] == "source"
    assert "set_log" in report["error"]
    assert report["violations"] == []


OPTIONS = [
    ("--queue-pairs", "3", "--ring", "16", "--size", "200", "--first-idx", "65530", "--tcp", "--no-check"),
    ("--source-userspace",),
]
if CAMPAIGN:
    OPTIONS += [("--endpoint", "echo"), ("--churn", "vlans"), ("--fault", "source:get_vring_base"), ("--rate", "0")]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_change_what_migrates_and_not_how_it_ends(shell: Shell, options: tuple[str, ...]) -> None:
    assert_well(migrate(shell, *options))


def test_a_destination_without_vhost_is_served_by_userspace(shell: Shell) -> None:
    assert_well(migrate(shell, "--target-userspace"), "userspace")


WAYS: list[tuple[str, set[str]]] = [("tx", {"first_tx"})]
if CAMPAIGN:
    WAYS += [("rx", {"first_rx"}), ("idle", set())]


@pytest.mark.parametrize(("traffic", "ways"), WAYS)
def test_traffic_goes_the_ways_asked_for(shell: Shell, traffic: str, ways: set[str]) -> None:
    report = migrate(shell, "--traffic", traffic)
    assert report["outcome"] == "vhost"
    assert report["spans_us"].keys() & {"first_tx", "first_rx"} == ways
    assert (report["ledger"]["sent"] > 0) is bool(ways)


def test_each_migration_back_and_forth_has_its_changes(shell: Shell) -> None:
    report = migrate(shell, "--repeat", "3", "--change", "mac", "--change", "queue_reset")
    assert_well(report)
    assert report["migrations"] == 3


def test_what_the_patch_gets_wrong_is_exit_status_1(shell: Shell) -> None:
    """E4: a source without vhost, and a destination that takes vhost for started."""
    report = migrate(shell, "--policy", "seed", "--source-userspace", "--traffic", "idle", exits=1)
    assert any("I4: queue 0 is enabled, and vhost" in text for text in report["violations"])


# --- faults ---


def faults(shell: Shell, *args: str, exits: int = 0) -> tuple[dict[str, Any], str]:
    """Run `vnetdp faults`; return its report and what it says."""
    done = shell.run_forked("faults", *args, "--json", "report.json")
    assert done.returncode == exits, done.stderr
    report: dict[str, Any] = json.loads((shell.folder / "report.json").read_text())
    assert set(report) == {"policy", "ok", "rows"}
    assert all(set(row) == ROW for row in report["rows"])
    assert report["ok"] is (exits == 0)
    return report, done.stdout


def test_one_row_of_the_matrix_can_be_run(shell: Shell) -> None:
    report, said = faults(shell, "--policy", "delta", "--only", "D1", "--queue-pairs", "2", "--traffic", "both")
    assert [row["id"] for row in report["rows"]] == [case.id for case in cases(2) if case.id.startswith("D1")]
    assert {(row["traffic"], row["queue_pairs"], row["ok"]) for row in report["rows"]} == {("both", 2, True)}
    assert re.fullmatch(r"8 cases, 0 failed, \d+ s\n", said)


def test_pairs_and_traffic_are_all_run_unless_named(shell: Shell) -> None:
    report, said = faults(shell, "--only", "B13", "--all")
    assert [(row["queue_pairs"], row["traffic"]) for row in report["rows"]] == [
        (pairs, traffic) for pairs in (1, 4) for traffic in ("idle", "both")
    ]
    assert said.count("B13 (") == 4


def test_rows_can_be_run_in_processes_of_their_own(shell: Shell) -> None:
    report, _ = faults(shell, "--only", "E4", "--queue-pairs", "1", "--traffic", "idle", "--jobs", "2")
    assert [(row["id"], row["ok"]) for row in report["rows"]] == [("E4", True)]


def test_a_row_that_is_wrong_is_shown(shell: Shell) -> None:
    report, said = faults(
        shell, "--policy", "seed", "--only", "D2/1,0", "--queue-pairs", "3", "--traffic", "idle", exits=1
    )
    wrong = [row for row in report["rows"] if not row["ok"]]
    assert [row["id"] for row in wrong] == ["D2/1,0/always"]
    assert said.startswith(
        "D2/1,0/always (idle, 3 pairs): SET_BACKEND, ring 1,0; E2: the retry fails: userspace (predicted)\n    "
    )
    assert "2 cases, 1 failed" in said
    assert said.splitlines()[-1].startswith(
        "of the failed cases 1 were predicted, and 0 were not; predicted but not seen: D1, D6,"
    )
    assert all(row["predicted"] for row in report["rows"])


def test_rows_are_listed_and_not_run(shell: Shell) -> None:
    done = shell.run_forked("faults", "--list", "--only", "a6/MAC", "--queue-pairs", "1")
    assert (done.returncode, done.stderr) == (0, "")
    ids = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert ids == [case.id for case in cases(1) if case.id.startswith("A6/mac/")]


def test_help_names_every_verb_that_can_fail(shell: Shell) -> None:
    said = " ".join(shell.run_forked("migrate", "--help").stdout.split())
    assert "phases are early, final and retry" in said
    assert f"verbs are {', '.join(FAULT_POINTS)}" in said


# --- wrong usage ---


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("migrate", "--policy", "best"), "invalid choice: 'best'"),
        (("migrate", "--queue-pairs", "0"), "the number of queue pairs is between 1 and 256, not '0'"),
        (("migrate", "--ring", "3"), "queue size 3 is not a power of two"),
        (("migrate", "--size", "63"), "a frame's size is between 64 and 9000, not '63'"),
        (("migrate", "--rate", "-1"), "'-1' is not a number above 0"),
        (("migrate", "--first-idx", "65536"), "an index is between 0 and 65535, not '65536'"),
        (("migrate", "--repeat", "0"), "a count is between 1 and"),
        (("migrate", "--change", "colour"), "invalid choice: 'colour'"),
        (("migrate", "--churn", "colour"), "invalid choice: 'colour'"),
        (("migrate", "--fault", "set_colour"), "fault 'set_colour' is not [PHASE.]VERB[:PAIR[,VRING]][:#N]"),
        (("migrate", "--fault", "late.set_log"), "fault 'late.set_log': the phase late is not early, final or retry"),
        (("migrate", "--endpoint", "colour"), "unknown endpoint 'colour'"),
        (("migrate", "--json", "nowhere/report"), "there is no folder nowhere: mkdir -p nowhere"),
        (("migrate", "--fault", "set_backend:9"), "none of 0,0 to 0,1 (PAIR,VRING) with --queue-pairs 1"),
        (("migrate", "--fault", "set_backend:0,2"), "index 2 is not None, 0 (receiveq) or 1 (transmitq)"),
        (
            ("migrate", "--endpoint", "generate:size=100"),
            "generate takes no options in migrate: use --size, --rate and",
        ),
        (
            ("migrate", "--endpoint", "fault:drop=0.5:generate"),
            "fault: its frames stay in their process, and do not migrate: take",
        ),
        (
            ("migrate", "--target-endpoint", "pcap:a"),
            "pcap: its frames stay in their process, and do not migrate: take",
        ),
        (("migrate", "--endpoint", "scapy:json:loads"), "scapy: its frames stay in their process, and do not migrate"),
        (("migrate", "--endpoint", "python:json:C"), "python: its frames stay in their process, and do not migrate"),
        (("migrate", "--endpoint", "vhost-user:s"), "vhost-user:SOCKET is an endpoint of link, on both sides"),
        (("migrate", "--endpoint", "tap:t0"), "source and destination need a TAP each, both in one bridge"),
        (
            ("migrate", "--endpoint", f"tap:{'t' * 16}", "--target-endpoint", "tap:t0"),
            "no interface name: 1 to 15 bytes",
        ),
        (("migrate", "--target-endpoint", "tap:t0,netns=nowhere-at-all"), "sudo ip netns add nowhere-at-all"),
        (("migrate", "--plot", "timeline.colour"), "'timeline.colour' does not end in .png, .svg or .pdf"),
        (("migrate", "--plot", "nowhere/x.png"), "there is no folder nowhere: mkdir -p nowhere"),
        (("migrate", "now"), "vnetdp migrate: unrecognized arguments: now (try vnetdp migrate --help)"),
        (("faults", "--only", "Z1"), "no row of the fault matrix begins with 'Z1'; rows are B1, B2"),
        (("faults", "--only", "A6/ma"), "no row of the fault matrix begins with 'A6/ma'; rows are B1, "),
        (("faults", "--policy", "best"), "invalid choice: 'best'"),
        (("faults", "--queue-pairs", "65"), "the number of queue pairs is between 1 and 64, not '65'"),
        (("faults", "--traffic", "some"), "invalid choice: 'some'"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_wrong_usage_is_one_clear_line(shell: Shell, args: tuple[str, ...], says: str) -> None:
    done = shell.run_forked(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"vnetdp[^\n]*\n", done.stderr)
    assert says in done.stderr
    assert list(Path(shell.folder).iterdir()) == []


# --- known defects ---


def test_a_migration_that_fails_before_the_stop_is_reported_and_not_drawn(shell: Shell) -> None:
    pytest.importorskip("matplotlib")
    done = shell.run("migrate", *RATE, "--fault", "source:set_log", "--plot", "timeline.png")
    assert done.returncode == 2
    assert "outcome source" in done.stdout
    assert "is not drawn" in done.stderr.splitlines()[-1]


def test_a_link_that_goes_down_is_no_violation(shell: Shell) -> None:
    report = migrate(shell, "--change", "link")
    assert (report["outcome"], report["violations"]) == ("userspace", [])
    if CAMPAIGN:
        assert migrate(shell, "--churn", "link")["violations"] == []


def test_policies_that_differ_are_refused_by_each(shell: Shell) -> None:
    faults(shell, "--policy", "none", "--only", "E6", "--queue-pairs", "1")
