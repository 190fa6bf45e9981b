"""Benchmarks: vnetdp and its peers, measured in the same run."""
