"""What the machine lacks or refuses is one line with the next step; what it does to output costs no result."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import COMPILED, no_descriptor_leaks
from tests.support.machine_bed import (
    OTHER_USER,
    as_user,
    limited,
    needs_root,
    needs_seccomp,
    on_a_disk,
    refusing,
    without_executable_memory,
)
from tests.system.test_exhaustion import descriptors
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import MachineError, OutputError
from vnetdp.guest.driver import memory_for
from vnetdp.system import output

_LINK = ["link", "null", "generate:count=10"]
_COMMAND = [sys.executable, "-m", "vnetdp"]


def run(command: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run *command* in *folder*; it may not have crashed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    done = subprocess.run(command, cwd=folder, text=True, timeout=240, check=False, **options)
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """Assert that a command was refused in one line, which tells *told*."""
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("vnetdp")
    for text in told:
        assert text in line


# --- memory, descriptors, threads, executable memory, system calls ---


@pytest.mark.parametrize(
    ("which", "mib", "command"),
    [
        (resource.RLIMIT_AS, 300, "ulimit -v"),
        (resource.RLIMIT_AS, 900, "ulimit -v"),
        (resource.RLIMIT_DATA, 100, "ulimit -d"),
        (resource.RLIMIT_FSIZE, 1, "ulimit -f"),
    ],
)
def test_too_little_memory_names_the_limit(tmp_path: Path, which: int, mib: int, command: str) -> None:
    args = [*_LINK, "--ring", "32768"]  # 4 GB of address space
    done = run([*_COMMAND, *args], tmp_path, preexec_fn=limited(which, mib << 20))
    refused(done, f"{mib} MiB", f"{command} unlimited")


@pytest.mark.skipif(not COMPILED, reason="plain Python compiles nothing")
def test_too_little_memory_to_compile_is_said_before_the_compiler_ends_the_process(tmp_path: Path) -> None:
    refuse = limited(resource.RLIMIT_AS, 600 << 20)
    done = run([*_COMMAND, *_LINK], tmp_path, preexec_fn=refuse, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    refused(done, "to compile the kernels takes 768 MiB", "ulimit -v unlimited")


@needs_root
def test_no_more_threads_names_the_limit(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    most = 2
    command = [*as_user(OTHER_USER), *_COMMAND, *_LINK]
    done = run(command, tmp_path, preexec_fn=limited(resource.RLIMIT_NPROC, most))
    refused(done, f"this user may have {most} threads", "ulimit -u unlimited")


@pytest.mark.skipif(not COMPILED, reason="plain Python compiles nothing")
def test_without_executable_memory_it_says_so(tmp_path: Path) -> None:
    refuse = without_executable_memory()
    refused(run([*_COMMAND, *_LINK], tmp_path, preexec_fn=refuse), "executable memory", "MemoryDenyWriteExecute")
    done = run([*_COMMAND, "doctor"], tmp_path, preexec_fn=refuse)
    assert done.returncode == 1
    assert "executable memory" in done.stdout


@needs_seccomp
@pytest.mark.parametrize("call", ["memfd_create", "eventfd2"])
def test_a_system_call_that_is_missing(tmp_path: Path, call: str) -> None:
    refused(run([*_COMMAND, *_LINK], tmp_path, preexec_fn=refusing(call, errno.ENOSYS)), "seccomp")


def test_descriptors_that_run_out_in_a_program_are_told_with_the_limit() -> None:
    with no_descriptor_leaks(), memory_for(1) as memory, NullEndpoint() as endpoint:
        made: list[NetDevice] = []
        with descriptors(60), pytest.raises(MachineError) as caught:
            while True:
                made.append(NetDevice(memory, endpoint))
        assert made
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert caught.value.errno == errno.EMFILE
        assert isinstance(caught.value, OSError)
        assert "descriptors are in use; raise the limit: ulimit -n" in str(caught.value)
        assert f" of {limit} " not in str(caught.value)  # the limit of then
        for device in made:
            device.close()


_THREADS = """
import json, os, resource, time
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.errors import MachineError

def settled():
    # The kernel has a thread that was joined for a moment more. OpenBLAS ends its threads, for good, before a fork, which
    # is what Python falls back on if a vfork fails: there may be fewer threads than before.
    until = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > tasks and time.monotonic() < until:
        time.sleep(0.001)
    return len(os.listdir("/proc/self/task")) <= tasks

tasks = len(os.listdir("/proc/self/task"))
Worker(1).close()
WorkerProcess(1).close()
most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
before = sorted(os.listdir("/proc/self/fd"))
said = []
for kind, more in ((Worker, 0), (Worker, 1), (WorkerProcess, 1)):
    settled()
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks + more, most))
    try:
        kind(1)
    except MachineError as e:
        said.append(str(e))
print(json.dumps([said, sorted(os.listdir("/proc/self/fd")) == before, settled()]))
"""


@needs_root
def test_a_thread_that_can_t_be_had_leaves_nothing_behind(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    # The limit counts every process of the user: also those of a suite beside this one.
    alone = OTHER_USER + os.getpid()
    done = run([*as_user(alone), sys.executable, "-c", _THREADS], tmp_path)
    said, same_descriptors, no_more_threads = json.loads(done.stdout)
    assert len(said) == 3
    assert all("this user may have" in text and "ulimit -u unlimited" in text for text in said)
    assert same_descriptors
    assert no_more_threads


# --- where output goes ---


def closing(*fds: int) -> Callable[[], None]:
    def close() -> None:
        for fd in fds:
            os.close(fd)

    return close


@pytest.mark.parametrize("fds", [(2,), (0, 1), (0, 1, 2)])
def test_with_streams_closed_files_and_json_are_as_ever(tmp_path: Path, fds: tuple[int, ...]) -> None:
    done = run([*_COMMAND, *_LINK, "--json", "r"], tmp_path, preexec_fn=closing(*fds))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r").read_text())["right"]["from_wire"] == 10
    done = run([*_COMMAND, *_LINK, "--json", "-"], tmp_path, preexec_fn=closing(*fds))
    if 1 not in fds:
        assert done.returncode == 0
        assert json.loads(done.stdout)["right"]["from_wire"] == 10
    else:
        assert done.returncode == 2
        assert "standard output is closed" in done.stderr or 2 in fds


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["link", "--help"], [*_LINK, "--json", "-"], [*_LINK, "--json", "r"]]
)
def test_a_full_disk_behind_standard_output_is_said_and_the_file_is_written(tmp_path: Path, args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run([*_COMMAND, *args], tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vnetdp: cannot write to standard output: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == (["r"] if args[-1] == "r" else [])


def test_progress_that_can_t_be_printed_costs_no_result(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run([*_COMMAND, "-v", *_LINK, "--json", "-"], tmp_path, stderr=full)
    assert done.returncode == 0
    assert json.loads(done.stdout)["right"]["from_wire"] == 10


@needs_root
def test_a_place_that_can_t_be_written_to_is_refused_before_any_work(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    refused(run(on_a_disk(disk, "ro", [*_COMMAND, *_LINK, "--json", "disk/r"]), tmp_path), "read-only")
    refused(run([*_COMMAND, *_LINK, "--json", "x" * 300], tmp_path), "File name too long")
    hidden = tmp_path / "hidden" / "below"
    hidden.mkdir(parents=True)
    hidden.parent.chmod(0)
    rights = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]
    os.chown(hidden.parent, OTHER_USER, OTHER_USER)
    refused(run([*rights, *_COMMAND, *_LINK, "--json", "hidden/below/r"], tmp_path), "Permission denied")


@needs_root
def test_a_report_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*_COMMAND, *_LINK, "--json", "disk/r"]
    look = 'dd if=/dev/zero of=disk/rest 2>/dev/null; "$@"; status=$?; ls disk; exit $status'
    done = run(on_a_disk(disk, "size=8k", ["sh", "-c", look, "sh", *command]), tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vnetdp: cannot write disk/r: No space left on device: make room")
    assert "right to left: 10 frames" in done.stdout
    assert done.stdout.splitlines()[-1] == "rest"


def test_a_report_whose_folder_is_gone_by_then_names_it_once(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "r"
    with pytest.raises(OutputError) as failed:
        output.write_json(str(path), {})
    assert str(failed.value).startswith(
        f"cannot write {path}: No such file or directory: there is no folder {path.parent}: "
    )


def test_a_current_folder_that_was_deleted_is_named_as_the_reason(tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    refused(
        run(["sh", "-c", script, "sh", *_COMMAND, *_LINK], tmp_path),
        "the current folder was deleted: cd to an existing one",
    )


@needs_root
def test_without_dev_null_a_stream_that_is_closed_costs_nothing_either(tmp_path: Path) -> None:
    done = run(on_a_disk(Path("/dev"), "size=64k", ["sh", "-c", 'exec "$@" <&-', "sh", *_COMMAND, *_LINK]), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_signs_that_the_terminal_lacks_are_replaced(tmp_path: Path, env: dict[str, str]) -> None:
    code = "from vnetdp.system import output; output.open_streams(); output.tell('5 \\xb5s'); output.say('5 \\xb5s')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    done = run([sys.executable, "-c", code], tmp_path, env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **env})
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 ?s\n", "5 ?s\n")


def test_a_driver_without_memory_says_how_much_there_is(tmp_path: Path) -> None:
    code = "\n".join(
        (
            "import resource",
            "from vnetdp.guest.driver import memory_for",
            "from vnetdp.errors import VnetdpError",
            f"resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))",
            "try: memory_for(8, num=32768)",
            "except VnetdpError as e: print(e)",
        )
    )
    done = run([sys.executable, "-c", code], tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert "of 1024 MiB are in use (ulimit -v); raise the limit" in done.stdout, done.stderr
