"""A long wire in asyncio: two devices of vnetdp on UNIX stream sockets, joined by a wire that takes time and loses frames.

    python examples/asyncio_wire.py /tmp/left.sock /tmp/right.sock 0.05 0.01     # 50 ms, one frame of 100 lost
    vnetdp link stream:/tmp/left.sock generate:rate=1k                            # and the same on the right

Each frame follows its length: 4 bytes, big endian. The wire needs nothing of vnetdp.
"""

from __future__ import annotations

import asyncio
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

LONGEST: Final = 65588  # bytes of a frame: an end that announces a longer one is closed
MOST_WAITING: Final = 1 << 20  # bytes that wait for an end; further frames for it are dropped


class End:
    """One end of the wire: it takes one connection after another, and frames for it are lost while there is none."""

    def __init__(self, delay_s: float, loss: float, chance: random.Random) -> None:
        self.delay_s = delay_s
        self.loss = loss
        self.chance = chance
        self.other = self
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry the frames of a connection to the other end, each after the delay."""
        self.writer = writer
        loop = asyncio.get_running_loop()
        with suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                if not 1 <= length <= LONGEST:
                    raise ValueError(length)
                frame = await reader.readexactly(length)
                if self.chance.random() >= self.loss:
                    loop.call_later(self.delay_s, self.other.deliver, frame)
        if self.writer is writer:
            self.writer = None
        writer.close()

    def deliver(self, frame: bytes) -> None:
        """Send a frame whole, or not at all."""
        writer = self.writer
        if writer is not None and writer.transport.get_write_buffer_size() < MOST_WAITING:
            writer.write(len(frame).to_bytes(4, "big") + frame)


async def main(left_path: str, right_path: str, delay_s: float, loss: float) -> None:
    chance = random.Random(1)
    left, right = End(delay_s, loss, chance), End(delay_s, loss, chance)
    left.other, right.other = right, left
    servers = [await asyncio.start_unix_server(left.serve, left_path)]
    servers.append(await asyncio.start_unix_server(right.serve, right_path))
    print(f"a wire from {left_path} to {right_path}; ^C ends it", flush=True)
    try:
        await asyncio.gather(*[server.serve_forever() for server in servers])
    finally:
        for path in (left_path, right_path):
            Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"usage: {sys.argv[0]} LEFT-SOCKET RIGHT-SOCKET SECONDS LOSS")
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])))
