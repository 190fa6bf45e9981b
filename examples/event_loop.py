"""A switch in plain sockets: devices of vnetdp, QEMU's guests and passt, each on a UNIX stream socket, in one event loop.

    python examples/event_loop.py /tmp/switch.sock
    vnetdp serve stream:/tmp/switch.sock --socket /tmp/net.sock     # for each guest

Each frame follows its length: 4 bytes, big endian. The switch learns the sender's port, and sends a frame to the port of its
destination, else to all others. It needs nothing of vnetdp.
"""

from __future__ import annotations

import selectors
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

LONGEST: Final = 65588  # bytes of a frame: a port that announces a longer one is closed
MOST_WAITING: Final = 1 << 20  # bytes that wait for a port; further frames for it are dropped


class Port:
    """A connection: the bytes that came in and are no whole frame yet, and those that have to go out."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.came = bytearray()
        self.waits = bytearray()

    def frames(self) -> list[bytes]:
        """Return the frames that are whole now; ValueError if the peer announces no frame."""
        found = []
        while len(self.came) >= 4:
            length = int.from_bytes(self.came[:4], "big")
            if not 1 <= length <= LONGEST:
                raise ValueError(f"a frame of {length} bytes")
            if len(self.came) < 4 + length:
                break
            found.append(bytes(self.came[4 : 4 + length]))
            del self.came[: 4 + length]
        return found

    def put(self, frame: bytes) -> None:
        """Have a frame sent whole, or not at all."""
        if len(self.waits) < MOST_WAITING:
            self.waits += len(frame).to_bytes(4, "big") + frame


class Switch:
    """All ports, in one thread that never waits for one of them."""

    def __init__(self, path: str) -> None:
        self.ports: set[Port] = set()
        self.learned: dict[bytes, Port] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.setblocking(False)
        self.listener.bind(path)
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, events in self.selector.select():
                if key.data is None:
                    self.accept()
                elif key.data in self.ports:  # not closed a moment ago
                    self.serve(key.data, events)

    def accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setblocking(False)
        port = Port(sock)
        self.ports.add(port)
        self.selector.register(sock, selectors.EVENT_READ, port)

    def serve(self, port: Port, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = port.sock.recv(1 << 16)
                if not data:
                    raise ConnectionError("the peer is gone")
                port.came += data
                for frame in port.frames():
                    self.forward(port, frame)
            if events & selectors.EVENT_WRITE:
                self.send(port)
        except (ConnectionError, ValueError) as e:
            print(f"port {port.sock.fileno()} is closed: {e}", flush=True)
            self.close(port)

    def forward(self, source: Port, frame: bytes) -> None:
        self.learned[frame[6:12]] = source
        to = self.learned.get(frame[:6])
        for port in [to] if to is not None else self.ports - {source}:
            port.put(frame)
            with suppress(ConnectionError):  # its own turn finds that out
                self.send(port)

    def send(self, port: Port) -> None:
        """Send as much as the port takes, and wait for it to take more if something is left."""
        with suppress(BlockingIOError):
            while port.waits:
                del port.waits[: port.sock.send(port.waits)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if port.waits else 0)
        self.selector.modify(port.sock, events, port)

    def end(self) -> None:
        for port in list(self.ports):
            self.close(port)
        self.selector.close()
        self.listener.close()

    def close(self, port: Port) -> None:
        self.selector.unregister(port.sock)
        self.ports.remove(port)
        self.learned = {mac: to for mac, to in self.learned.items() if to is not port}
        port.sock.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOCKET")
    switch = Switch(sys.argv[1])
    try:
        print(f"a switch listens on {sys.argv[1]}; ^C ends it", flush=True)
        switch.run()
    except KeyboardInterrupt:
        pass
    finally:
        switch.end()
        Path(sys.argv[1]).unlink()
