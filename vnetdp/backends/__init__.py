"""Backends: where a datapath runs. All are driven by vhost's verbs."""
