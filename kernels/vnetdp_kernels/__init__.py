"""The data plane of vnetdp: Numba kernels over split virtqueues in shared memory.

Start reading at `layout` (the specification's numbers), then `split` (the ring), `net` (virtio-net) and `loops`.
"""
