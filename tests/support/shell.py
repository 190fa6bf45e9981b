"""Shell: commands of the program, run in a folder of their own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support.by_hand import CAMPAIGN, wait_for
from tests.support.zygote import MARK, branch, name_of, popen
from vnetdp.cli import main

TIMEOUT = 240  # seconds: the first command of a cold cache compiles


class Shell:
    """Runs commands in a folder of their own, and knows every process that comes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = str(uuid.uuid4())
        self._env = {**os.environ, MARK: self._mark, "COLUMNS": "100"}

    def start(self, *args: str | bytes, **options: Any) -> subprocess.Popen[str]:
        return popen(
            [sys.executable, "-m", "vnetdp", *args],
            cwd=self.folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *args: str | bytes, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it may not have crashed, nor left a process behind."""
        return self.finish(self.start(*args, **options))

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        try:
            out, err = (text or "" for text in process.communicate(timeout=TIMEOUT))  # None of one that was closed
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        assert "Traceback" not in err, err
        wait_for(lambda: not self.processes(), "every process of the command has ended")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_forked(self, *args: str | bytes) -> subprocess.CompletedProcess[str]:
        """As `run`, in a fork of this process, which has imported everything; with VNETDP_CAMPAIGN=1 it is `run`."""
        if CAMPAIGN:
            return self.run(*args)
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
            pid = os.fork()
        if pid == 0:
            self._become(args, to_out, to_err)
        os.close(to_out)
        os.close(to_err)
        try:
            with open(out) as said, open(err) as complained:
                texts = said.read(), complained.read()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert "Traceback" not in texts[1], texts[1]
        wait_for(lambda: not self.processes(), "every process of the command has ended")
        return subprocess.CompletedProcess(args, status, *texts)

    def _become(self, args: Sequence[str | bytes], out: int, err: int) -> NoReturn:
        """Be the command."""
        status = -1
        try:
            os.chdir(self.folder)
            os.environ.update(self._env)
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
            logging.root.handlers.clear()
            branch()
            status = main([os.fsdecode(arg) for arg in args])
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:  # noqa: BLE001 - nothing may pass: behind it are the tests
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status & 0xFF)

    def processes(self) -> list[int]:
        """Return the ids of the processes that came of our commands, and still run."""
        found = []
        mark, name = f"{MARK}={self._mark}".encode(), name_of(self._mark).encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = mark in (path / "environ").read_bytes().split(b"\0")
                if marked or (
                    (path / "comm").read_bytes().strip() == name and (path / "stat").read_text().split()[2] != "Z"
                ):
                    found.append(int(path.name))
            except OSError:
                continue  # it has just ended, or is another user's
        return found
