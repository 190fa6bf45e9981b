"""The cache of compiled kernels: it can't hold yesterday's code, and no state of it keeps a kernel from running.

By default a process that has the copied package alone is a fork of this one, with Numba imported; with VNETDP_CAMPAIGN=1 a
new one.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import stat
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from numba.core import config

import vnetdp_kernels
from tests.project.test_package import here, python
from tests.support.by_hand import CAMPAIGN
from tests.support.machine_bed import OTHER_USER, as_user, needs_root, needs_seccomp, on_a_disk

_HELPER = """
from ..platform.jit import kernel

@kernel
def step(x: int) -> int:
    return x + {step}
"""
_CALLER = """
from .net.helper import step
from .platform.jit import kernel

@kernel
def twice(x: int) -> int:
    return step(step(x))
"""
_CALL = """
import json
from vnetdp_kernels.caller import twice
from vnetdp_kernels.platform.jit import cache_is_warm

warm = cache_is_warm(twice)
print(json.dumps([twice(0), warm, sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values())]))
"""


_DAMAGE = """
import json
from vnetdp_kernels import caller
from vnetdp_kernels.platform import cache, jit

def call():
    again = jit.kernel(caller.twice.py_func)
    return [again(0), sum(again.stats.cache_hits.values()), sum(again.stats.cache_misses.values())]

def flip(data):
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]

DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "another file's": lambda path: path.write_bytes(bytes(range(256)) * 16),
    "one bit flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
    "gone": lambda path: path.unlink(),
    "a pipe": lambda path: (path.unlink(), __import__("os").mkfifo(path)),
}
call()
folder = cache.writable().path
found = {}
for kind in ("nbi", "nbc"):
    for name, damage in DAMAGES.items():
        (path,) = folder.glob(f"caller.twice-*.{kind}")
        damage(path)
        found[f"{kind} {name}"] = [call(), call()]
print(json.dumps([found, [path.name for path in folder.glob("*.tmp")]]))
"""


def forked(code: str, folder: Path, **env: str) -> Any:
    """As `python`, in a fork of this process that forgets what it has imported of vnetdp."""
    out, to_out = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(to_out, 1)
            sys.stdout = os.fdopen(1, "w")
            _begin_anew(folder, env)
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may pass: behind it are the tests
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(to_out)
    with open(out) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return json.loads(text)


def _begin_anew(folder: Path, env: dict[str, str]) -> None:
    gc.freeze()
    warnings.resetwarnings()
    sys.dont_write_bytecode = True
    os.chdir(folder)
    os.environ.update(env)
    config.reload_config()
    sys.path.insert(0, env["PYTHONPATH"])
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("vnetdp", "vnetdp_kernels"):
            del sys.modules[name]


class CopiedKernels:
    """A copy of the package, where a kernel in one file calls a helper in another, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "vnetdp_kernels"
        self.cache = folder / "cache"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(str(vnetdp_kernels.__file__)).parent, self.package, ignore=ignored)
        (self.package / "caller.py").write_text(_CALLER)
        self.edit_helper(1)

    def edit_helper(self, step: int) -> None:
        (self.package / "net" / "helper.py").write_text(_HELPER.format(step=step))

    def env(self, **env: str) -> dict[str, str]:
        settings = {"NUMBA_DISABLE_JIT": "0", "NUMBA_BOUNDSCHECK": "0", "NUMBA_CACHE_DIR": str(self.cache)}
        return {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **settings, **env}

    def call(self, code: str = _CALL, **env: str) -> list[Any]:
        """Call the kernel in a new process; return its result, whether the cache said it was warm, hits and misses."""
        run = python if CAMPAIGN else forked
        found: list[Any] = run(code, self.folder, **self.env(**env))
        return found

    def call_by(self, command: list[str], code: str = _CALL, **env: str) -> list[Any]:
        """Call the kernel in a new process that *command* starts, in an empty folder, without a home that is there."""
        nowhere = self.folder / "nowhere"
        nowhere.mkdir(mode=0o555, exist_ok=True)
        homes = {"HOME": str(nowhere / "home"), "XDG_CACHE_HOME": str(nowhere / "home" / "cache")}
        done = subprocess.run(
            [*command, sys.executable, "-c", code],
            cwd=nowhere,
            env={**os.environ, **homes, **self.env(**env)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not list(nowhere.iterdir())
        found: list[Any] = json.loads(done.stdout)
        return found

    def seal(self) -> None:
        """Take from everybody the right to write into the package."""
        for path in [self.package, *self.package.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)


_TROUBLE = "from vnetdp_kernels.platform import cache" + _CALL.replace("]))", ", cache.trouble()]))")
# Root that heeds permissions, as in a container that dropped these.
_HEEDING = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--"]


@pytest.fixture
def kernels(tmp_path: Path) -> CopiedKernels:
    tmp_path.chmod(0o755)
    return CopiedKernels(tmp_path)


def test_a_second_process_compiles_nothing(kernels: CopiedKernels) -> None:
    assert kernels.call() == [2, False, 0, 1]
    assert kernels.call() == [2, True, 1, 0]


def test_an_edited_helper_in_another_file_makes_the_cache_stale(kernels: CopiedKernels) -> None:
    kernels.call()
    kernels.edit_helper(10)
    assert kernels.call() == [20, False, 0, 1]
    assert kernels.call() == [20, True, 1, 0]


def test_a_new_file_in_the_package_makes_the_cache_stale(kernels: CopiedKernels) -> None:
    kernels.call()
    (kernels.package / "another.py").write_text("X = 1\n")
    assert kernels.call() == [2, False, 0, 1]
    assert kernels.call() == [2, True, 1, 0]
    (kernels.package / "room").mkdir()
    (kernels.package / "room" / "__init__.py").write_text("Y = 1\n")
    assert kernels.call() == [2, False, 0, 1]


def test_checked_code_and_unchecked_code_do_not_meet_in_the_cache(kernels: CopiedKernels) -> None:
    assert kernels.call() == [2, False, 0, 1]
    assert kernels.call(NUMBA_BOUNDSCHECK="1") == [2, False, 0, 1]
    assert kernels.call(NUMBA_BOUNDSCHECK="1") == [2, True, 1, 0]
    assert kernels.call() == [2, True, 1, 0]


def test_without_the_jit_nothing_is_cached(kernels: CopiedKernels) -> None:
    code = "import json; from vnetdp_kernels.caller import twice; print(json.dumps([twice(3)]))"
    assert kernels.call(code, NUMBA_DISABLE_JIT="1") == [5]
    assert not list(kernels.cache.rglob("*.nbi"))


# --- a cache that is damaged ---


def test_what_is_damaged_is_compiled_anew_and_is_whole_again(kernels: CopiedKernels) -> None:
    found, left = kernels.call(_DAMAGE)
    assert found
    assert found == {name: [[2, 0, 1], [2, 1, 0]] for name in found}
    assert not left


def test_machine_code_of_another_version_is_not_loaded_whatever_the_index_says(kernels: CopiedKernels) -> None:
    kernels.call()
    (old,) = kernels.cache.rglob("caller.twice-*.nbc")
    code = old.read_bytes()
    kernels.edit_helper(10)
    kernels.call()
    old.write_bytes(code)  # a crash between the two files
    assert kernels.call()[0] == 20


# --- nowhere to keep it ---


@needs_root
def test_with_nowhere_to_write_kernels_run_and_the_user_hears_of_it(kernels: CopiedKernels) -> None:
    kernels.seal()
    *called, trouble = kernels.call_by(_HEEDING, _TROUBLE, NUMBA_CACHE_DIR="/proc/nowhere")
    assert called == [2, False, 0, 1]
    assert "NUMBA_CACHE_DIR" in trouble
    assert str(kernels.package) in trouble
    *called, trouble = kernels.call_by(as_user(OTHER_USER), _TROUBLE, NUMBA_CACHE_DIR="", HOME="", XDG_CACHE_HOME="")
    assert called == [2, False, 0, 1]  # a user without an entry in passwd, and without a home
    assert "NUMBA_CACHE_DIR" in trouble


_FOLDERS = """
import json
from numba import config
from vnetdp_kernels import caller
from vnetdp_kernels.platform import cache, jit

found = {}
for folder in ("/dev/null", "/proc/nowhere", "x" * 300, "/dev/null/below", "there/is/a/file"):
    config.CACHE_DIR = folder
    again = jit.kernel(caller.twice.py_func)
    found[folder] = [again(0), cache.writable() and cache.trouble()]
print(json.dumps(found))
"""


def test_a_cache_folder_that_can_t_be_is_named_and_another_taken(kernels: CopiedKernels) -> None:
    (kernels.folder / "there").write_text("")
    for folder, (result, trouble) in dict(kernels.call(_FOLDERS)).items():
        assert result == 2
        assert trouble.startswith("NUMBA_CACHE_DIR can't be used, so compiled kernels are kept in ")
        assert folder in trouble


_SAID = """
import json, logging, sys
from vnetdp import warmup
from vnetdp.programs import doctor
from vnetdp.system import output
from vnetdp_kernels.caller import twice

said = []
log = logging.Handler()
log.emit = lambda record: said.append(record.getMessage())
logging.getLogger("vnetdp").addHandler(log)
warmup.compile_once("a kernel", [twice], lambda: twice(0), said.append)
sys.modules["vnetdp_kernels.loops.serve"].serve = sys.modules["vnetdp_kernels.loops.drive"].drive = twice
check = doctor._cache()
print(json.dumps([said, check.detail, check.advice]))
"""


@needs_root
def test_that_kernels_can_t_be_kept_is_said_before_they_are_compiled(kernels: CopiedKernels) -> None:
    kernels.seal()
    nowhere = {"NUMBA_CACHE_DIR": "/proc/nowhere"}
    said, _, _ = kernels.call_by(_HEEDING, _SAID, **nowhere)
    assert said[0].startswith("compiled kernels can't be kept, so each run compiles them anew; set NUMBA_CACHE_DIR to")
    assert said[1].startswith("compiling a kernel, at each start: ")
    assert said[2].startswith("compiled in ")
    assert len(said) == 3


@needs_root
def test_a_cache_that_is_warm_and_read_only_is_used_and_nobody_is_told_to_compile(kernels: CopiedKernels) -> None:
    assert kernels.call(_SAID, NUMBA_CACHE_DIR="")[0][0].startswith("compiling a kernel, once for an installation: ")
    kernels.seal()
    warm = f"warm, in {kernels.package / '__pycache__'}"
    assert kernels.call_by(_HEEDING, _SAID, NUMBA_CACHE_DIR="") == [[], warm, ""]
    said, detail, advice = kernels.call_by(_HEEDING, _SAID, NUMBA_CACHE_DIR="/proc/nowhere")
    assert said == [advice]
    assert detail == warm
    instead = f"compiled kernels are taken from {kernels.package / '__pycache__'} (/proc/nowhere"
    assert advice.startswith(f"NUMBA_CACHE_DIR can't be used, so {instead}")


@needs_root
@pytest.mark.parametrize("options", ["size=8k", "nr_inodes=3"])
def test_on_a_full_disk_no_part_is_kept_and_the_user_hears_of_it(kernels: CopiedKernels, options: str) -> None:
    kernels.cache.mkdir()
    code = f"{_TROUBLE}\nimport os, sys; print([f for _, _, f in os.walk({str(kernels.cache)!r})], file=sys.stderr)"
    command = on_a_disk(kernels.cache, options, [sys.executable, "-c", code])
    done = subprocess.run(
        command, cwd=kernels.folder, env={**os.environ, **kernels.env()}, capture_output=True, text=True, check=False
    )
    *called, trouble = json.loads(done.stdout)
    assert called == [2, False, 0, 1]
    assert "each run compiles them anew" in trouble
    assert "No space left on device" in trouble
    assert "tmp" not in done.stderr


# --- a cache that users share ---


@needs_root
def test_what_root_compiled_under_a_narrow_umask_serves_other_users(kernels: CopiedKernels) -> None:
    for cache in (str(kernels.folder / "made" / "for" / "us"), ""):
        narrow = "import os; os.umask(0o077)\n"
        assert kernels.call(narrow + _CALL, NUMBA_CACHE_DIR=cache)[2:] == [0, 1]
        for path in (kernels.folder / "made").rglob("*") if cache else kernels.package.rglob("*.nb[ic]"):
            for each in (path, path.parent):
                assert each.stat().st_mode & stat.S_IROTH, f"{each}: {each.stat().st_mode:o}"
        assert kernels.call_by(as_user(OTHER_USER), NUMBA_CACHE_DIR=cache) == [2, True, 1, 0]


@needs_root
def test_machine_code_that_another_user_may_have_put_there_is_not_loaded(kernels: CopiedKernels) -> None:
    kernels.call()
    (code,) = kernels.cache.rglob("caller.twice-*.nbc")
    folder = code.parent
    assert kernels.call() == [2, True, 1, 0]
    code.chmod(0o666)
    assert kernels.call()[2:] == [0, 1]
    assert kernels.call() == [2, True, 1, 0]
    for path in (kernels.cache, folder, *folder.iterdir()):
        os.chown(path, OTHER_USER, OTHER_USER)
        path.chmod(0o777 if path.is_dir() else 0o644)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    *called, trouble = kernels.call(_TROUBLE)
    assert called[2:] == [0, 1]
    assert f"it belongs to user {OTHER_USER}" in trouble
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert kernels.call() == [2, True, 1, 0]  # from beside the sources


# --- the lock that saves work ---

_LOCKS = """
import errno, json, os
from pathlib import Path
from tests.support.machine_bed import refusing
from vnetdp import warmup
from vnetdp_kernels.platform import cache

lock = cache.writable().path / "compiling.lock"
had = []
for name, prepare in {
    "a pipe": lambda: os.mkfifo(lock),
    "a folder": lock.mkdir,
    "a link to nowhere": lambda: lock.symlink_to("/proc/nowhere"),
    "not to be had": refusing("flock", errno.ENOLCK),
}.items():
    prepare()
    with warmup._one_at_a_time():
        had.append(name)
    if lock.is_dir():
        lock.rmdir()
    else:
        lock.unlink(missing_ok=True)
print(json.dumps(had))
"""


@needs_seccomp
def test_a_lock_that_can_t_be_had_is_done_without(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    settings = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0", "PYTHONPATH": f"{here()}:{root}"}
    assert python(_LOCKS, tmp_path, **settings) == ["a pipe", "a folder", "a link to nowhere", "not to be had"]
