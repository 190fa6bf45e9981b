"""The data plane of vnetdp: Numba kernels over split virtqueues in shared memory.

Start reading at `spec` (the numbers of the specification) and `rows` (our own), then `split` (the ring), `net` and `loops`.
"""
