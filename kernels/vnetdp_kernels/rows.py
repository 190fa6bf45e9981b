"""Our own rows, codes and bundles: how kernels keep state, what they return, and which arrays they take.

A row is an int64 array with named slots. A status code takes the place of a count. A bundle holds the arrays of one role: it
is one argument, which Numba passes as a struct.

The classes of bundles lie in a module that can be imported, and never in `__main__`: Numba's key of a compiled kernel names
the class of a bundle, so a class of `__main__` would miss the cache in every process. No Numba here: the control plane
imports this file early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from .platform.atomic import Bytes, Words

# A chain may not be longer than the queue (2.7.4.2), but Linux sends longer indirect tables on small rings.
MIN_CHAIN_CAP: Final = 1024

FRAME_SLOT: Final = 65600  # bytes a frame slot has: virtio_net_hdr, frame, and up to a multiple of 64
STREAM_SLOTS: Final = 2  # frame slots a stream has each way: its bytes are moved to the front without overlap

# The device's row of a queue: int64[VQ_SLOTS]. Private to the owner of the ring, readable by all.
VQ_NUM: Final = 0
VQ_DESC: Final = 1  # window offsets of the three parts; -1 = address not set
VQ_AVAIL: Final = 2
VQ_USED: Final = 3
VQ_LAST_AVAIL_IDX: Final = 4  # next avail index to take, u16
VQ_LAST_USED_IDX: Final = 5  # next used index to write, u16
VQ_AVAIL_IDX: Final = 6  # the driver's avail.idx when last read
VQ_SIGNALLED_USED: Final = 7  # used index at the last decision about a call
VQ_SIGNALLED_USED_VALID: Final = 8
VQ_EVENT_IDX: Final = 9  # VIRTIO_RING_F_EVENT_IDX negotiated
VQ_INDIRECT: Final = 10  # VIRTIO_RING_F_INDIRECT_DESC negotiated
VQ_MRG_RXBUF: Final = 11  # VIRTIO_NET_F_MRG_RXBUF negotiated
VQ_HDR_LEN: Final = 12  # of virtio_net_hdr, from the negotiated features
VQ_STATUS: Final = 13  # 0, or the E_* that broke the queue
VQ_BOUND: Final = 14  # 1: an endpoint is bound, the owner serves the ring
VQ_ENABLED: Final = 15  # 1: enabled (vhost-user: SET_VRING_ENABLE)
VQ_LOG_USED: Final = 16  # guest address under which used-ring writes are logged; -1 = not logged
VQ_DESC_GPA: Final = 17  # guest addresses of the three parts
VQ_AVAIL_GPA: Final = 18
VQ_USED_GPA: Final = 19
VQ_KICKS_ON: Final = 20  # 1: the driver is asked to kick
VQ_PACKETS: Final = 21  # frames moved, counted once each
VQ_BYTES: Final = 22  # of frames, without virtio_net_hdr
VQ_DROPPED: Final = 23  # frames dropped here, all reasons
VQ_CALLS: Final = 24  # used buffer notifications sent
VQ_KICKS: Final = 25  # available buffer notifications seen
VQ_OFFLOADS: Final = 26  # receive offloads the driver took: OFFLOAD_*
VQ_CHAINS: Final = 27  # chains used
VQ_INFLIGHT: Final = 28  # window offset of the queue's part of the inflight area (vhost-user); 0 = none
VQ_JOURNAL: Final = 29  # transmitq: window offset of the journal of ring-to-ring moves; 0 = none
VQ_CALL_DUE: Final = 30  # 1: bound a moment ago; the driver may wait for a call that was never decided on
VQ_MAX_FRAME: Final = 31  # bytes of the longest frame that is no segment and has no VLAN tag, by the MTU; 0 = any
VQ_NOTED: Final = 32  # in a batch: 1 + the number of a page that was written and not marked dirty yet; 0 = none
VQ_SLOTS: Final = 40

# Our journal, behind the standard part: used.idx of both queues as a move from ring to ring will leave them.
JOURNAL_RECEIVEQ_IDX: Final = 0  # u16
JOURNAL_TRANSMITQ_IDX: Final = 2  # u16
JOURNAL_VALID: Final = 4  # u16; 1 while the two are being published
JOURNAL_LEN: Final = 64

# The driver's row of a queue: int64[DVQ_SLOTS]. Private to the driver.
DVQ_NUM: Final = 0
DVQ_DESC: Final = 1
DVQ_AVAIL: Final = 2
DVQ_USED: Final = 3
DVQ_AVAIL_IDX: Final = 4  # next avail index to fill, u16
DVQ_PUBLISHED_IDX: Final = 5  # avail.idx as the device sees it
DVQ_LAST_USED_IDX: Final = 6  # next used index to read, u16
DVQ_KICKED_IDX: Final = 7  # avail index at the last decision about a kick
DVQ_FREE_HEAD: Final = 8  # first free descriptor; num = none
DVQ_NUM_FREE: Final = 9
DVQ_EVENT_IDX: Final = 10
DVQ_IN_ORDER: Final = 11  # VIRTIO_F_IN_ORDER negotiated
DVQ_ORDER_HEAD: Final = 12  # in order: head of the oldest chain in flight
DVQ_MRG_RXBUF: Final = 13
DVQ_HDR_LEN: Final = 14
DVQ_STATUS: Final = 15  # 0, or the E_* the device earned
DVQ_BUF_OFFSET: Final = 16  # window offset of buffer 0; buffer i serves descriptor i
DVQ_BUF_GPA: Final = 17
DVQ_BUF_LEN: Final = 18  # bytes of one buffer
DVQ_PACKETS: Final = 19
DVQ_BYTES: Final = 20
DVQ_DROPPED: Final = 21
DVQ_KICKS: Final = 22
DVQ_CALLS_ON: Final = 23
DVQ_FREE_TAIL: Final = 24  # last free descriptor
DVQ_USED_IDX: Final = 25  # the device's used.idx when last read
DVQ_IN_FLIGHT: Final = 26  # chains put and not taken back
DVQ_BATCH_ID: Final = 27  # in order: the element that stands for several chains; -1 = none
DVQ_BATCH_LEN: Final = 28
DVQ_CALLS: Final = 29  # used buffer notifications seen
DVQ_SLOTS: Final = 32

# The driver's private state of a descriptor: int64[num, DESC_STATE_SLOTS].
DS_NEXT: Final = 0  # next free descriptor, or next of the chain
DS_N_DESC: Final = 1  # descriptors the chain headed here takes from the table; 0 = not a head in flight
DS_LEN_IN: Final = 2  # writable bytes of the chain
DS_TOKEN: Final = 3  # the caller's number, returned with the chain
DESC_STATE_SLOTS: Final = 4

# Rows of tables and scratch arrays.
REGION_GPA: Final = 0  # regions int64[n, REGION_SLOTS]
REGION_LEN: Final = 1
REGION_OFFSET: Final = 2
REGION_SLOTS: Final = 3
IOV_OFFSET: Final = 0  # iov int64[n, IOV_SLOTS]
IOV_LEN: Final = 1
IOV_GPA: Final = 2
IOV_SLOTS: Final = 3

# Status codes, which a kernel returns in place of a count. Each breaks the queue, except E_TOO_BIG and E_BLOCKED.
E_ADDRESS: Final = -1  # a range is not wholly inside guest memory
E_HEAD: Final = -2  # avail.ring holds a head >= num
E_NEXT: Final = -3  # desc.next is outside its table
E_LOOP: Final = -4  # more descriptors than the table has
E_ORDER: Final = -5  # a readable descriptor follows a writable one
E_ZERO_LEN: Final = -6  # a descriptor of zero bytes
E_TOTAL_LEN: Final = -7  # a chain of more than 2**32 bytes
E_INDIRECT_FEATURE: Final = -8  # INDIRECT without VIRTIO_RING_F_INDIRECT_DESC
E_INDIRECT_LEN: Final = -9  # an indirect table of zero bytes, or not a multiple of 16, or too long
E_INDIRECT_NESTED: Final = -10  # INDIRECT inside an indirect table
E_INDIRECT_NEXT: Final = -11  # INDIRECT together with NEXT
E_AVAIL_IDX: Final = -12  # avail.idx ran ahead by more than num, or backwards
E_DIRECTION: Final = -13  # a receive chain without a writable byte, a transmit chain without a readable one
E_USED_ID: Final = -14  # driver: the device used a chain that is not in flight
E_USED_IDX: Final = -15  # driver: used.idx ran ahead of the chains in flight
E_USED_LEN: Final = -16  # driver: the device claims more bytes than the chain can hold
E_NUM_BUFFERS: Final = -17  # driver: num_buffers is zero or more than the device has used
E_TOO_BIG: Final = -18  # the frame fits in no chain the driver could offer: drop it
E_BLOCKED: Final = -19  # the endpoint takes no more now: try again later
E_FULL: Final = -20  # driver: no free descriptors

# An endpoint's row: int64[EP_SLOTS], in shared memory beside its frame slots.
EP_KIND: Final = 0
EP_SIZE: Final = 1  # generate: bytes of a frame, without virtio_net_hdr
EP_FLOW: Final = 2  # generate: number of the flow stamped into each frame
EP_SEQ: Final = 3  # generate: number of the next frame
EP_LIMIT: Final = 4  # generate: frames to send; -1 = no end
EP_INTERVAL_NS: Final = 5  # generate: between two frames; 0 = as fast as the ring takes them
EP_NEXT_NS: Final = 6  # generate: when the next frame is due
EP_FIRST: Final = 7  # first frame slot, wire to guest, not yet delivered
EP_COUNT: Final = 8  # frame slots, wire to guest, not yet delivered
EP_OUT_FIRST: Final = 9  # the same, guest to wire, for endpoints in Python
EP_OUT_COUNT: Final = 10  # also the frames that faulty wires hold back, as EP_COUNT has those of the other way
EP_CHECK: Final = 11  # 1: frames from the guest are checked against the ledger
EP_DROP_SHORT: Final = 12  # counters of frames dropped, by reason
EP_DROP_LONG: Final = 13
EP_DROP_ERROR: Final = 14  # the endpoint refused the frame (errno other than EAGAIN)
EP_DROP_NO_BUFFER: Final = 15  # no receive buffer could ever hold it
EP_TO_WIRE: Final = 16  # frames, guest to wire
EP_FROM_WIRE: Final = 17  # frames, wire to guest
EP_LAST_ERRNO: Final = 18
EP_BYTES_TO_WIRE: Final = 19
EP_BYTES_FROM_WIRE: Final = 20
EP_PENDING: Final = 21  # bytes of the frame in hand, wire to guest, that found no receive buffer yet; 0 = none
EP_DROP_OFFLOAD: Final = 22  # the frame needs an offload that its receiver did not negotiate
EP_GONE: Final = 23  # 1: its descriptor reports an error whenever it is polled; not polled any more
# 1: it takes no more frames now. An endpoint in Python does not say when it will again; a socket is polled, or is lost.
EP_BLOCKED: Final = 24
EP_LINES: Final = 25  # faulty wires from here to the endpoint behind them; 0 = it is that endpoint
EP_LOST: Final = 26  # socket: 0 = connected; else LOST_*, or -errno: no frame passes
EP_TOLD_NS: Final = 27  # the time of a clock that was handed in, plus 1; 0 = the machine's clock is read
EP_SLOTS: Final = 32

# Of a stream, in slots that otherwise only a generator has.
EP_OUT_FRAMES: Final = EP_NEXT_NS  # frames in out_frames, not wholly sent
EP_OUT_PART: Final = EP_SEQ  # bytes of the first of them that were sent

# EP_LOST, besides -errno. Kernels set it, and no one else while a queue is bound; the endpoint's thread clears it.
LOST_END: Final = 1  # the peer closed the connection, or there was none yet
LOST_LENGTH: Final = 1 << 32  # + the length that the peer announced: no frame has so many bytes, or none

# EP_KIND. The kinds below KIND_PYTHON run inside the loop; Python serves the rest in batches. From KIND_TAP on they have a
# descriptor. From KIND_FAULT on, an endpoint may take no frame for reasons of its own (`port.takes`).
KIND_NULL: Final = 0
KIND_ECHO: Final = 1
KIND_MACSWAP: Final = 2
KIND_REFLECT: Final = 3
KIND_GENERATE: Final = 4
KIND_TAP: Final = 5
KIND_STREAM: Final = 6
KIND_DGRAM: Final = 7
KIND_FAULT: Final = 8  # a faulty wire, and behind it an endpoint of the kinds up to KIND_TAP
KIND_PYTHON: Final = 9
KIND_FAULT_PYTHON: Final = 10  # a faulty wire, and behind it an endpoint in Python

# A faulty wire has a line each way: int64[LINE_SLOTS]. The row of an endpoint behind faulty wires has STAGE_SLOTS for each
# of them, the outermost first: its EP_ slots, its line to the wire, its line from the wire. Then come the EP_SLOTS of the
# endpoint itself.
LINE_HEAD: Final = 0  # entry of the oldest frame held
LINE_HELD: Final = 1  # frames held, but for the one that is overtaken
LINE_TAIL: Final = 2  # byte where the next frame goes
LINE_FIRST: Final = 3  # byte where the oldest frame lies
LINE_DUE_NS: Final = 4  # when the oldest frame is due; 0 = at once
LINE_RETRY_NS: Final = 5  # not before then, since it was put off; 0 = at once
LINE_TRIES: Final = 6  # how often the oldest frame was put off by a fault
LINE_SEEN: Final = 7  # frames that came to the line: the number of the last one
LINE_KEY: Final = 8  # u32: from the seed, the queue and the way
LINE_AT: Final = 9  # the one frame that faults strike, by its number; 0 = any
LINE_DELAY_NS: Final = 10
LINE_JITTER_NS: Final = 11  # a frame is held back so much longer or shorter, at most
LINE_RATE: Final = 12  # bits a second; 0 = no limit
LINE_FREE_NS: Final = 13  # when the last frame has been sent at that rate
LINE_BAD: Final = 14  # burst: 1 in the bad state
LINE_ASIDE_LEN: Final = 15  # reorder: bytes of the frame that the next one is to overtake; 0 = none
LINE_ASIDE_NUMBER: Final = 16
LINE_ASIDE_COPIES: Final = 17
LINE_ASIDE_NS: Final = 18  # when it waits no longer
LINE_CLOCK: Final = 19  # two words: scratch of a clock
LINE_CHANCE: Final = 21  # CHANCE_…: a probability, in parts of 2^32
LINE_STRUCK: Final = 32  # STRUCK_…: how often each fault struck
LINE_TOLD_NS: Final = 47  # as EP_TOLD_NS
LINE_SLOTS: Final = 48
STAGE_SLOTS: Final = EP_SLOTS + 2 * LINE_SLOTS

CHANCE_DROP: Final = 0
CHANCE_CORRUPT: Final = 1
CHANCE_DUPLICATE: Final = 2
CHANCE_REORDER: Final = 3
CHANCE_EIO: Final = 4
CHANCE_EAGAIN: Final = 5
CHANCE_TO_BAD: Final = 6  # burst: from the good state to the bad one, and back
CHANCE_TO_GOOD: Final = 7
CHANCE_LOSS_BAD: Final = 8  # burst: a frame is lost, in either state
CHANCE_LOSS_GOOD: Final = 9

STRUCK_BURST: Final = 6  # the first six are those of CHANCE_
STRUCK_DELAY: Final = 7
STRUCK_RATE: Final = 8

# The frames of a line: a table int64[LINE_TABLE] of entries, a ring of bytes, and the place of the frame that is overtaken.
# Tables and bytes lie one after the other, as the lines do; behind them an endpoint in Python has its slots, out first.
ENTRY_OFFSET: Final = 0
ENTRY_LEN: Final = 1
ENTRY_DUE_NS: Final = 2
ENTRY_NUMBER: Final = 3
ENTRY_SLOTS: Final = 4
LINE_FRAMES: Final = 4096
LINE_TABLE: Final = LINE_FRAMES * ENTRY_SLOTS
LINE_RING: Final = 1 << 23
LINE_BYTES: Final = LINE_RING + FRAME_SLOT

# A row of the ledger: int64[LEDGER_SLOTS] a flow, and its window of numbers seen: uint8[LEDGER_WINDOW].
LEDGER_NEXT: Final = 0  # the lowest number above all seen
LEDGER_DELIVERED: Final = 1
LEDGER_MISSING: Final = 2  # numbers passed over, not seen since
LEDGER_DUPLICATED: Final = 3
LEDGER_REORDERED: Final = 4  # seen after a higher number
LEDGER_CORRUPTED: Final = 5
LEDGER_FOREIGN: Final = 6  # frames without our mark
LEDGER_COUNTS: Final = 8  # slots of counts; behind them are the notes
# The notes of one kind: how many there are, then the numbers of the first LEDGER_NOTED frames.
LEDGER_NOTED: Final = 100
LEDGER_NOTE_SLOTS: Final = 1 + LEDGER_NOTED
LEDGER_NOTE_MISSING: Final = LEDGER_COUNTS  # a late frame's number is taken out again
LEDGER_NOTE_DUPLICATED: Final = LEDGER_NOTE_MISSING + LEDGER_NOTE_SLOTS
LEDGER_NOTE_REORDERED: Final = LEDGER_NOTE_DUPLICATED + LEDGER_NOTE_SLOTS
LEDGER_NOTE_CORRUPTED: Final = LEDGER_NOTE_REORDERED + LEDGER_NOTE_SLOTS  # the number that was due then
LEDGER_SLOTS: Final = 416
LEDGER_WINDOW: Final = 65536  # numbers behind LEDGER_NEXT that are told apart as late or duplicate

# A numbered frame: Ethernet header, then (little endian) mark u32, flow u16, its own length u16 (modulo 2**16), number
# u64, then a pattern.
LEDGER_ETHERTYPE: Final = 0x88B5  # IEEE local experimental
LEDGER_MARK: Final = 0x504E5644
LEDGER_MARK_AT: Final = 14
LEDGER_FLOW_AT: Final = 18
LEDGER_LEN_AT: Final = 20
LEDGER_SEQ_AT: Final = 22
LEDGER_PATTERN_AT: Final = 30
LEDGER_MIN_LEN: Final = 30

# The notifiers of a queue: int64[queues, 2], its kick and its call, a descriptor each; -1 = none.
NOTIFY_PEER: Final = 1 << 32  # added to the descriptor of a call that a peer shares: the peer can make it blocking

# The control words a loop looks at: int64[CTL_SLOTS], shared with the code that steers it.
CTL_DOORBELL: Final = 0  # not 0: leave the loop
CTL_PASSES: Final = 1
CTL_SLEEPS: Final = 2
CTL_SLOTS: Final = 8

# Why a loop returned.
LOOP_CONTROL: Final = 0  # the doorbell rang, or a descriptor of the control plane's is readable
LOOP_BUDGET: Final = 1  # it moved as many packets as it was allowed
LOOP_IDLE: Final = 2  # nothing to do, and it was told not to wait
LOOP_PYTHON: Final = 3  # an endpoint in Python has work
LOOP_BROKEN: Final = 4  # a queue broke; its row says how

# One side of the rings of a device, by the addresses of all arrays that its loop works on: int64[SIDE_SLOTS].
SIDE_IS_DRIVER: Final = 0  # 1: the driver's side, which `drive` runs; 0: the device's, and `serve`
SIDE_LOOP: Final = 1  # the address of that kernel; 0 in plain Python
SIDE_CONTROL_FD: Final = 2  # of `Control`
# Its arrays, VIEW_SLOTS each: the address, and the dimensions; an array of one dimension is one row.
VIEW_SLOTS: Final = 4
SIDE_MEM: Final = 3  # of `Guest`, `Rings` and `DriverRings`
SIDE_REGIONS: Final = 7
SIDE_LOG: Final = 11
SIDE_STATES: Final = 15
SIDE_QUEUES: Final = 19
SIDE_NOTIFY: Final = 23
SIDE_EPS: Final = 27  # of `Wire`, in its order
SIDE_FDS: Final = 31
SIDE_PENDING: Final = 35
SIDE_IN_FRAMES: Final = 39
SIDE_IN_LENGTHS: Final = 43
SIDE_OUT_FRAMES: Final = 47
SIDE_OUT_LENGTHS: Final = 51
SIDE_LEDGER: Final = 55
SIDE_WINDOWS: Final = 59
SIDE_CTL: Final = 63  # of `Control`
SIDE_IOV: Final = 67  # of `LoopScratch`, in its order
SIDE_FRAME_IOV: Final = 71
SIDE_CHAINS: Final = 75
SIDE_HDR: Final = 79
SIDE_WORDS: Final = 83
SIDE_POLLFDS: Final = 87
SIDE_ONE: Final = 91
SIDE_SLOTS: Final = 95

SETTLE_MORE: Final = 1  # frames may still move
SETTLE_BROKEN: Final = 2  # a queue broke


# --- bundles ---


class Guest(NamedTuple):
    """Guest memory, as the device sees it."""

    mem: Bytes  # uint8[n]: the window
    regions: Words  # int64[k, REGION_SLOTS]: guest addresses to window offsets
    log: Bytes  # uint8[n]: the dirty log; empty = writes are not logged


class Rings(NamedTuple):
    """All virtqueues of a device, the device's side: receiveq 2i, transmitq 2i + 1."""

    guest: Guest
    vqs: Words  # int64[2 * pairs, VQ_SLOTS]
    notify: Words  # int64[2 * pairs, 2]: kick and call descriptors; -1 = none


class DriverRings(NamedTuple):
    """All virtqueues of a device, the driver's side."""

    mem: Bytes  # uint8[n]: the window
    dvqs: Words  # int64[2 * pairs, DVQ_SLOTS]
    states: Words  # int64[2 * pairs, num, DESC_STATE_SLOTS]
    notify: Words  # int64[2 * pairs, 2]: kick and call descriptors; -1 = none


class Wire(NamedTuple):
    """An endpoint: a row of each array for a queue pair, except for the ledger."""

    eps: Words  # int64[pairs, EP_SLOTS]
    fds: Words  # int64[pairs]; -1 = none
    pending: Bytes  # uint8[pairs, FRAME_SLOT]: the frame from the wire that found no receive buffer yet
    in_frames: (
        Bytes  # uint8[pairs, slots * slot_len]: frames from an endpoint in Python; lines of faulty wires lie before
    )
    in_lengths: Words  # int64[pairs, slots]
    out_frames: Bytes  # uint8[pairs, slots * slot_len]: frames for an endpoint in Python
    out_lengths: Words  # int64[pairs, slots]
    ledger: Words  # int64[flows, LEDGER_SLOTS]
    windows: Bytes  # uint8[flows, LEDGER_WINDOW]


# A kernel is called with seven words for each array of one dimension: so one queue pair of an endpoint has two bundles.


class Source(NamedTuple):
    """One queue pair of an endpoint, where frames come from: its rows of a `Wire`."""

    ep: Words
    fd: int
    pending: Bytes
    in_frames: Bytes
    in_lengths: Words


class Sink(NamedTuple):
    """One queue pair of an endpoint, where frames go to: its rows of a `Wire`."""

    ep: Words
    fd: int
    out_frames: Bytes
    out_lengths: Words
    ledger: Words
    windows: Bytes


class Line(NamedTuple):
    """One way of a faulty wire."""

    words: Words  # int64[LINE_SLOTS]
    table: Words  # int64[LINE_TABLE]
    data: Bytes  # uint8[LINE_BYTES]


class Frame(NamedTuple):
    """A frame where it lies: rows [row, n_rows) of *iov* name its pieces in *mem*, *length* bytes together."""

    mem: Bytes
    iov: Words  # int64[n, IOV_SLOTS]
    row: int
    n_rows: int
    length: int


class Scratch(NamedTuple):
    """Arrays that a kernel writes, and that are not read after it. Never shared between threads."""

    iov: Words  # int64[2 * cap, IOV_SLOTS]: the buffers of chains
    frame_iov: Words  # int64[cap, IOV_SLOTS]: the pieces of a frame
    chains: Words  # int64[n, 2]: head and bytes of each chain that a frame takes
    hdr: Bytes  # uint8[HDR_SCRATCH]: a virtio_net_hdr
    words: Words  # int64[SCRATCH_WORDS]: struct iovecs, and a clock's answer


class LoopScratch(NamedTuple):
    """The `Scratch` of the kernels that a loop calls for frames, and arrays that the loop itself writes."""

    frames: Scratch
    pollfds: Words  # int64[2, n]: struct pollfds, and the code of each (`wait`)
    one: Words  # as `peer.tell_words`


class Control(NamedTuple):
    """How a loop is called away."""

    words: Words  # int64[CTL_SLOTS]
    fd: int  # readable when the doorbell rang; -1 = none


class Limits(NamedTuple):
    """When a loop returns of itself."""

    budget: int  # frames; -1 = no end
    poll_us: int  # busy-poll as long before sleeping; -1 = for ever
    timeout_ms: int  # 0 = do not wait; -1 = wait until the doorbell rings
