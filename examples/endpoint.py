"""An endpoint of one's own answers frames, sends one by itself, and outlives the vhost worker that serves it."""

import select
import time

from vnetdp import Driver, FrameEndpoint, NetDevice, Owner, Worker, memory_for, warm_up

HEADER = bytes.fromhex("020000000002 020000000001 88b5")  # to, from, and an EtherType for experiments


class Loud(FrameEndpoint):
    """It sends each frame back with its payload in capitals, *times* times."""

    name = "loud"

    def __init__(self, queues: int = 1, times: int = 1) -> None:
        super().__init__(queues)
        self.times = times

    def frame_received(self, frame: bytes, queue: int) -> list[bytes]:
        return [frame[6:12] + frame[:6] + frame[12:14] + frame[14:].upper()] * self.times


def next_payload(guest: Driver) -> bytes:
    select.select([guest], [], [])  # readable while frames wait
    return guest.receive()[0][14:]


def main() -> None:
    warm_up()
    with (
        memory_for() as memory,
        Loud() as wire,
        Worker(pairs=1) as worker,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory) as guest,
    ):
        guest.start()
        guest.send(HEADER + b"first")
        print(device.owner.value, next_payload(guest))
        worker.kill()  # a test's way to let the worker die
        while device.owner is not Owner.USERSPACE:
            time.sleep(0.01)
        guest.send(HEADER + b"second")
        print(device.owner.value, next_payload(guest))
        wire.send(HEADER + b"unasked")
        print(device.owner.value, next_payload(guest), wire.errors)


if __name__ == "__main__":
    main()
