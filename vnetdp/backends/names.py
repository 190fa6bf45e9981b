"""The names of vhost's verbs, and of all that a fault can strike, for errors and --help, without NumPy."""

from __future__ import annotations

from typing import Final

# The verbs of a start of vhost, in the order in which it runs them, and the verb that asks for an index at its end.
VERBS: Final = (
    "set_mtu",
    "set_features",
    "set_memory",
    "set_log",
    "set_vring_num",
    "set_vring_base",
    "set_vring_addr",
    "set_vring_kick",
    "set_vring_call",
    "set_backend",
    "get_vring_base",
)
# The spelling of a fault. The parts behind the place may come in any order.
FAULT: Final = "[PHASE.]VERB[:PAIR[,VRING]][:#N][:ERRNO][:delay=S][:once|always]"
FAULT_PARTS: Final = "#N: the N-th call; ERRNO: such as ENOMEM; delay=S: S seconds longer, and without ERRNO no failure"
UNBIND: Final = "unbind"  # set_backend without an endpoint, which the kernel's vhost never fails
FAULT_POINTS: Final = (
    *VERBS,
    UNBIND,
    "grab_ioeventfd",
    "set_host_notifier",
    "set_guest_notifiers",
    "unset_guest_notifiers",
)
