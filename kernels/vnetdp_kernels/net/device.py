"""virtio-net, the device's side (Virtio 1.2, 5.1.6): transmitq to an endpoint, an endpoint to receiveq, ring to ring.

A frame that must go to the guest is described by a virtio_net_hdr, and by rows (offset, length) of the rest: so it is
copied once, wherever it lies.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    copy,
    load_u8,
    store_u16,
    store_u16_release,
    store_u16_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel
from ..rows import Frame, Guest, Scratch, Sink, Source
from ..virtq import split_device as ring
from ..virtq.memory import note, write, write_header
from ..wire.frame import accepts, exceeds_mtu, linearize, makes_sense, split_header, swap_macs, take_front, tidy
from ..wire.port import emit, now_ns, produce
from ..wire.reflect import reply

_SHORT = 128  # bytes of a frame that is written as soon as asked for
_MACS_LEN = 12  # the two addresses of an Ethernet header
_NO_ANSWER = -1000  # no E_*: the frame is taken, and not answered


@inlined
def _scatter(
    guest: Guest, vq: Words, iov: Words, row: int, into: int, src: Bytes, src_offset: int, length: int
) -> tuple[int, int]:
    """Write *length* bytes into *iov* from byte *into* of *row* on; return where the next byte goes."""
    done = 0
    while done < length:
        part = min(length - done, iov[row, r.IOV_LEN] - into)
        offset, gpa = iov[row, r.IOV_OFFSET] + into, iov[row, r.IOV_GPA] + into
        write(guest.mem, vq, guest.log, offset, gpa, src, src_offset + done, part)
        done += part
        into += part
        if into == iov[row, r.IOV_LEN]:
            row += 1
            into = 0
    return row, into


@inlined
def place(guest: Guest, vq: Words, scratch: Scratch, ahead: int, hdr: Bytes, swap: bool, frame: Frame) -> int:
    """Put one frame into receive buffers, *ahead* chains behind the next one; return the chains it took.

    hdr: its virtio_net_hdr. swap: exchange its MAC addresses; *hdr* then has room for them behind the header. Writes iov and
    chains of *scratch*. Returns 0 if the driver has not made enough buffers available yet, E_TOO_BIG if no buffers could
    hold the frame, or the E_* of a malformed chain. Nothing is published.
    """
    mem = guest.mem
    iov = scratch.iov
    hdr_len = vq[r.VQ_HDR_LEN]
    need = hdr_len + frame.length
    if ahead < ring.available(mem, vq) and hdr_len == spec.NET_HDR_LEN and frame.n_rows - frame.row == 1:
        # The common shape: one piece, into one buffer of one descriptor.
        head = ring.head_at(mem, vq, ahead)
        if head >= 0:
            n_out, n_in, _, size = ring.gather(mem, guest.regions, vq, head, iov)
            if n_out == 0 and n_in == 1 and size >= need:
                to = iov[0, r.IOV_OFFSET]
                at = frame.iov[frame.row, r.IOV_OFFSET]
                write_header(mem, to, hdr, 0, 1)
                copy(mem, to + spec.NET_HDR_LEN, frame.mem, at, frame.length)
                if swap:
                    swap_macs(mem, to + spec.NET_HDR_LEN, frame.mem, at)
                if guest.log.size > 0:
                    note(vq, guest.log, iov[0, r.IOV_GPA], need)
                ring.put_used(mem, vq, ahead, head, need)
                return 1
    taken = _claim(guest, vq, scratch, ahead, need)
    if taken <= 0:
        return taken
    store_u16_unaligned(hdr, spec.NET_HDR_NUM_BUFFERS, taken)
    row = frame.row
    to_row, into = _scatter(guest, vq, iov, 0, 0, hdr, 0, hdr_len)
    if swap:
        row = take_front(frame, _MACS_LEN, hdr, spec.NET_HDR_LEN)
        swap_macs(hdr, spec.NET_HDR_LEN, hdr, spec.NET_HDR_LEN)
        to_row, into = _scatter(guest, vq, iov, to_row, into, hdr, spec.NET_HDR_LEN, _MACS_LEN)
    for k in range(row, frame.n_rows):
        at, part = frame.iov[k, r.IOV_OFFSET], frame.iov[k, r.IOV_LEN]
        to_row, into = _scatter(guest, vq, iov, to_row, into, frame.mem, at, part)
    left = need
    for k in range(taken):
        part = min(left, scratch.chains[k, 1])
        ring.put_used(mem, vq, ahead + k, scratch.chains[k, 0], part)
        left -= part
    return taken


@inlined
def _claim(guest: Guest, vq: Words, scratch: Scratch, ahead: int, need: int) -> int:
    """Gather receive chains of *need* bytes in all, from *ahead* chains behind the next on.

    Returns the number of chains; otherwise as `place`.
    """
    mem = guest.mem
    iov = scratch.iov
    chains = scratch.chains
    room = 0
    taken = 0
    filled = 0
    alone = False
    n_avail = ring.available(mem, vq)
    while room < need:
        if taken and not vq[r.VQ_MRG_RXBUF]:
            return r.E_TOO_BIG
        if ahead + taken >= n_avail:
            n_avail = ring.refresh(mem, vq)
            if n_avail < 0:
                return n_avail
            if ahead + taken >= n_avail:
                return r.E_TOO_BIG if taken >= vq[r.VQ_NUM] else 0
        if taken >= chains.shape[0] or filled >= iov.shape[0]:
            return r.E_TOO_BIG
        head = ring.head_at(mem, vq, ahead + taken)
        if head < 0:
            return head
        n_out, n_in, _, size = ring.gather(mem, guest.regions, vq, head, iov[filled:])
        if n_out < 0 and filled:
            # Rows used up by the merge are no fault of the driver's: look at this chain by itself.
            filled = 0
            alone = True
            continue
        if n_out < 0:
            return n_out
        if n_out > 0 or n_in == 0:
            return r.E_DIRECTION
        if alone:
            return r.E_TOO_BIG
        chains[taken, 0] = head
        chains[taken, 1] = size
        filled += n_in
        room += size
        taken += 1
    return taken


@inlined
def _count(vq: Words, frames: int, size: int, chains: int) -> None:
    """Enter into a queue's row the *frames* that it moved, of *size* bytes, and the chains that it used."""
    vq[r.VQ_PACKETS] += frames
    vq[r.VQ_BYTES] += size
    vq[r.VQ_CHAINS] += chains


@kernel
def drain_transmitq(guest: Guest, vq: Words, sink: Sink, scratch: Scratch, budget: int) -> int:
    """Hand up to *budget* frames of the transmitq to the endpoint, and publish their chains as used.

    Returns the chains used. A malformed chain breaks the queue: its E_* goes into the row, and the good chains
    before it are still published. A chain no longer than its header is used and counted, nothing more.
    """
    mem = guest.mem
    hdr = scratch.hdr
    ep = sink.ep
    n = min(ring.available(mem, vq), budget)
    status = min(n, 0)
    used = 0
    frames = ep[r.EP_TO_WIRE]
    size = ep[r.EP_BYTES_TO_WIRE]
    while used < n:
        head = ring.head_at(mem, vq, used)
        if head < 0:
            status = head
            break
        n_out, _, length, _ = ring.gather(mem, guest.regions, vq, head, scratch.iov)
        if n_out <= 0:
            status = n_out if n_out < 0 else r.E_DIRECTION
            break
        row, length = split_header(Frame(mem, scratch.iov, 0, n_out, length), vq[r.VQ_HDR_LEN], hdr)
        frame = Frame(mem, scratch.iov, row, n_out, length)
        tidy(hdr, frame.length, spec.VIRTIO_NET_HDR_F_NEEDS_CSUM)
        if exceeds_mtu(vq, load_u8(hdr, spec.NET_HDR_GSO_TYPE), frame):
            ep[r.EP_DROP_LONG] += 1
        elif emit(frame, hdr, sink, scratch.words):
            break
        ring.put_used(mem, vq, used, head, 0)
        used += 1
    if used:
        ring.publish_used(mem, vq, guest.log, used)
        # The endpoint counts the frames it took; the rest is dropped, and its row says why.
        frames = ep[r.EP_TO_WIRE] - frames
        _count(vq, frames, ep[r.EP_BYTES_TO_WIRE] - size, used)
        vq[r.VQ_DROPPED] += used - frames
    if status < 0:
        vq[r.VQ_STATUS] = status
    return used


@kernel
def discard_transmitq(mem: Bytes, vq: Words, log: Bytes, budget: int) -> int:
    """Use up to *budget* chains of the transmitq without a look at them (vhost-user: started, but disabled)."""
    n = min(ring.available(mem, vq), budget)
    status = min(n, 0)
    used = 0
    while used < n:
        head = ring.head_at(mem, vq, used)
        if head < 0:
            status = head
            break
        ring.put_used(mem, vq, used, head, 0)
        used += 1
    if used:
        ring.publish_used(mem, vq, log, used)
        vq[r.VQ_DROPPED] += used
        vq[r.VQ_CHAINS] += used
    if status < 0:
        vq[r.VQ_STATUS] = status
    return used


@kernel
def fill_receiveq(guest: Guest, vq: Words, source: Source, scratch: Scratch, budget: int) -> int:
    """Bring up to *budget* frames from the endpoint into receive buffers, and publish these as used.

    The frame in hand stays in source.pending (EP_PENDING bytes) while no buffer is there for it. Nothing is taken from the
    endpoint while the ring is empty. Returns the frames dealt with: placed, or dropped.
    """
    mem = guest.mem
    ep = source.ep
    pending = source.pending
    rows = scratch.frame_iov
    now = now_ns(ep, scratch.words)
    used = 0
    frames = 0
    dropped = 0
    size = 0
    # Dropped frames count too: a wire that sends nothing else must not keep us here.
    while frames + dropped < budget:
        if ep[r.EP_PENDING] == 0:
            n = ring.available(mem, vq)
            if n >= 0 and used >= n:
                n = ring.refresh(mem, vq)
            if n < 0:
                vq[r.VQ_STATUS] = n
                break
            if used >= n:
                break
            length = produce(source, pending, 0, pending.size, now)
            if length == 0:
                break
            if not accepts(pending, 0, vq[r.VQ_OFFLOADS]):
                ep[r.EP_DROP_OFFLOAD] += 1
                dropped += 1
                continue
            rows[0, r.IOV_OFFSET] = spec.NET_HDR_LEN
            rows[0, r.IOV_LEN] = length - spec.NET_HDR_LEN
            frame = Frame(pending, rows, 0, 1, length - spec.NET_HDR_LEN)
            if exceeds_mtu(vq, load_u8(pending, spec.NET_HDR_GSO_TYPE), frame):
                ep[r.EP_DROP_LONG] += 1
                dropped += 1
                continue
            ep[r.EP_PENDING] = length
        body_len = ep[r.EP_PENDING] - spec.NET_HDR_LEN
        if ep[r.EP_PENDING] > _SHORT:
            ring.prefetch_frame(mem, guest.regions, vq, used + 1, ep[r.EP_PENDING])  # the next one often is as long
        rows[0, r.IOV_OFFSET] = spec.NET_HDR_LEN
        rows[0, r.IOV_LEN] = body_len
        n = place(guest, vq, scratch, used, pending, False, Frame(pending, rows, 0, 1, body_len))
        if n == r.E_TOO_BIG:
            ep[r.EP_DROP_NO_BUFFER] += 1
            ep[r.EP_PENDING] = 0
            dropped += 1
            continue
        if n <= 0:
            if n < 0:
                vq[r.VQ_STATUS] = n
            break
        ep[r.EP_PENDING] = 0
        used += n
        frames += 1
        size += body_len
    if used:
        ring.publish_used(mem, vq, guest.log, used)
        _count(vq, frames, size, used)
    vq[r.VQ_DROPPED] += dropped
    return frames + dropped


@kernel
def forward(
    src: Guest, txq: Words, dst: Guest, rxq: Words, ep: Words, slot: Bytes, scratch: Scratch, budget: int
) -> int:
    """Move up to *budget* frames from a transmitq straight into a receiveq, copying each once.

    The queues may be of one guest (echo, macswap, reflect) or of two. A frame without receive buffers stays in the
    transmitq. *slot* (uint8[FRAME_SLOT]) is where reflect writes its answers. Returns the chains used in the transmitq.
    """
    kind = ep[r.EP_KIND]
    n = min(ring.available(src.mem, txq), budget)
    status_tx = min(n, 0)
    status_rx = 0
    used_tx = 0
    used_rx = 0
    frames = 0
    size = 0
    hdr = scratch.hdr
    while used_tx < n:
        head = ring.head_at(src.mem, txq, used_tx)
        if head < 0:
            status_tx = head
            break
        n_out, _, length, _ = ring.gather(src.mem, src.regions, txq, head, scratch.frame_iov)
        if n_out <= 0:
            status_tx = n_out if n_out < 0 else r.E_DIRECTION
            break
        row, length = split_header(Frame(src.mem, scratch.frame_iov, 0, n_out, length), txq[r.VQ_HDR_LEN], hdr)
        frame = Frame(src.mem, scratch.frame_iov, row, n_out, length)
        tidy(hdr, frame.length, spec.VIRTIO_NET_HDR_F_NEEDS_CSUM)
        ring.prefetch_frame(dst.mem, dst.regions, rxq, used_rx + 1, spec.NET_HDR_LEN + frame.length)
        got = 0
        if _may_pass(txq, rxq, ep, kind, hdr, frame):
            if kind == r.KIND_REFLECT:
                got = _reflect(dst, rxq, scratch, used_rx, slot, frame)
            else:
                got = place(dst, rxq, scratch, used_rx, hdr, kind == r.KIND_MACSWAP, frame)
            if got == 0:
                break
        if got > 0:
            used_rx += got
            frames += 1
            size += frame.length
        elif got == _NO_ANSWER:
            ep[r.EP_TO_WIRE] += 1
            ep[r.EP_BYTES_TO_WIRE] += frame.length
            _count(txq, 1, frame.length, 0)
        elif got == r.E_TOO_BIG:
            ep[r.EP_DROP_NO_BUFFER] += 1
            rxq[r.VQ_DROPPED] += 1
        elif got < 0:
            status_rx = got
            break
        ring.put_used(src.mem, txq, used_tx, head, 0)
        used_tx += 1
    journal = txq[r.VQ_JOURNAL]
    if journal and used_rx:
        _write_journal(src.mem, txq, used_tx, rxq, used_rx)
    if used_rx:
        _publish_forwarded(dst, rxq, ep, used_rx, frames, size)
    if used_tx:
        ring.publish_used(src.mem, txq, src.log, used_tx)
        _count(txq, frames, size, used_tx)
        if journal:
            store_u16_release(src.mem, journal + r.JOURNAL_VALID, 0)
    if status_tx < 0:
        txq[r.VQ_STATUS] = status_tx
    if status_rx < 0:
        rxq[r.VQ_STATUS] = status_rx
    return used_tx


@inlined
def _publish_forwarded(dst: Guest, rxq: Words, ep: Words, used: int, frames: int, size: int) -> None:
    """Publish the receiveq's chains, and count their frames: for the endpoint, they went out and came in."""
    ring.publish_used(dst.mem, rxq, dst.log, used)
    _count(rxq, frames, size, used)
    ep[r.EP_TO_WIRE] += frames
    ep[r.EP_FROM_WIRE] += frames
    ep[r.EP_BYTES_TO_WIRE] += size
    ep[r.EP_BYTES_FROM_WIRE] += size


@inlined
def _write_journal(mem: Bytes, txq: Words, used_tx: int, rxq: Words, used_rx: int) -> None:
    """Write down both indices that come next, as two can't be published as one: for the owner after a crash in between."""
    journal = txq[r.VQ_JOURNAL]
    store_u16(mem, journal + r.JOURNAL_RECEIVEQ_IDX, rxq[r.VQ_LAST_USED_IDX] + used_rx)
    store_u16(mem, journal + r.JOURNAL_TRANSMITQ_IDX, txq[r.VQ_LAST_USED_IDX] + used_tx)
    store_u16_release(mem, journal + r.JOURNAL_VALID, 1)


@inlined
def _may_pass(txq: Words, rxq: Words, ep: Words, kind: int, hdr: Bytes, frame: Frame) -> bool:
    """Return whether a frame can go from *txq* to *rxq*; if not, count it as dropped."""
    gso = load_u8(hdr, spec.NET_HDR_GSO_TYPE)
    if frame.length < spec.ETH_HLEN:
        ep[r.EP_DROP_SHORT] += 1
    elif frame.length > spec.MAX_FRAME_LEN or exceeds_mtu(txq, gso, frame) or exceeds_mtu(rxq, gso, frame):
        ep[r.EP_DROP_LONG] += 1
    elif kind != r.KIND_REFLECT and not (makes_sense(hdr, 0, frame.length) and accepts(hdr, 0, rxq[r.VQ_OFFLOADS])):
        ep[r.EP_DROP_OFFLOAD] += 1
    else:
        return True
    txq[r.VQ_DROPPED] += 1
    return False


@inlined
def _reflect(guest: Guest, rxq: Words, scratch: Scratch, ahead: int, slot: Bytes, frame: Frame) -> int:
    """`place` the answer to a frame, made in *slot*; _NO_ANSWER if it asks for none."""
    linearize(frame, slot, spec.NET_HDR_LEN)
    answer_len = reply(slot, spec.NET_HDR_LEN, frame.length)
    if answer_len == 0:
        return _NO_ANSWER
    store_u64_unaligned(slot, 0, 0)
    store_u16_unaligned(slot, 8, 0)
    rows = scratch.frame_iov
    rows[0, r.IOV_OFFSET] = spec.NET_HDR_LEN
    rows[0, r.IOV_LEN] = answer_len
    return place(guest, rxq, scratch, ahead, slot, False, Frame(slot, rows, 0, 1, answer_len))
