"""A real guest without any right: User Mode Linux on `vnetdp serve stream:`, and passt at the other end of the stream."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.by_hand import wait_for
from tests.support.passt import GUEST, HOST, passt, unprivileged, why_no_passt

from .guests import images
from .guests.machine import Uml, process

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

_START_S = 240  # the first command of a cold cache compiles


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and tells nobody."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve the files of *folder* by HTTP on the loopback; give the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def uml() -> None:
    missing = [tool for tool in ("apt-get", "dpkg", "cpio") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if (why := why_no_passt()) is not None:
        pytest.skip(why)
    try:
        images.uml()
    except images.MissingError as e:
        pytest.skip(str(e))


def test_a_guest_reaches_a_server_on_the_host_without_any_right(uml: None, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    content = os.urandom(20 << 20)
    (files / "file").write_bytes(content)
    sock, log = tmp_path / "socket", tmp_path / "serve.log"
    with passt() as path, served(files) as port:
        serve = [sys.executable, "-m", "vnetdp", "serve", f"stream:{path}", "--socket", str(sock)]
        with process(unprivileged(serve), log) as running:
            wait_for(lambda: "ends it" in log.read_text() or running.poll() is not None, "it serves", _START_S)
            assert running.poll() is None, log.read_text()
            with Uml(tmp_path, sock, prefix=unprivileged([])) as guest:
                guest.boot()
                guest.run(f"ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up")
                said = guest.run(f"wget -q -O - http://{HOST}:{port}/file | sha256sum")
                assert said.split()[0] == hashlib.sha256(content).hexdigest()
