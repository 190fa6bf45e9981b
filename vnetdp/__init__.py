"""vnetdp: a virtio-net device in Python, whose packets compiled kernels move, with vhost offload and live migration.

Every name here is public and stable; docs/api.md says what that promises. All other modules are internal.

Names are loaded when they are first used: `import vnetdp` loads neither NumPy nor Numba.
"""

from __future__ import annotations

from ._version import __version__ as __version__

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all else that a command does first

# Public name: the module that defines it, or the module itself. The order is that of docs/api.md and of the reference.
_HOME = {
    "NetDevice": "device.device",
    "Owner": "device.owners",
    "Driver": "guest.driver",
    "Clock": "endpoints.clock",
    "Announcer": "endpoints.announce",
    "World": "world.world",
    "warm_up": "warmup",
    "memory_for": "guest.driver",
    "settle": "stepping",
    "GuestMemory": "shared.memory",
    "Region": "shared.memory",
    "DirtyLog": "shared.memory",
    "SharedBlock": "shared.memory",
    "driver_block": "guest.driver",
    "EventFd": "shared.notify",
    "Endpoint": "endpoints.base",
    "FrameEndpoint": "endpoints.frames",
    "parse_endpoint": "endpoints.spec",
    "NullEndpoint": "endpoints.loopback",
    "EchoEndpoint": "endpoints.loopback",
    "MacswapEndpoint": "endpoints.loopback",
    "ReflectEndpoint": "endpoints.loopback",
    "GenerateEndpoint": "endpoints.loopback",
    "Ledger": "endpoints.loopback",
    "FrameNumbers": "endpoints.loopback",
    "drained": "endpoints.loopback",
    "MailboxEndpoint": "endpoints.mailbox",
    "TapEndpoint": "endpoints.tap",
    "StreamEndpoint": "endpoints.sock",
    "DgramEndpoint": "endpoints.sock",
    "FdEndpoint": "endpoints.fd",
    "PcapEndpoint": "endpoints.pcap",
    "ScapyEndpoint": "endpoints.scapy",
    "SocketEndpoint": "endpoints.scapy",
    "VnetdpSocket": "endpoints.scapy",
    "FaultEndpoint": "endpoints.fault",
    "Worker": "backends.worker",
    "WorkerProcess": "backends.process",
    "Backend": "backends.base",
    "Datapath": "datapath.datapath",
    "UserspaceBackend": "backends.userspace",
    "Fault": "backends.faulty",
    "Faults": "backends.faulty",
    "FaultyBackend": "backends.faulty",
    "VhostUserFrontEnd": "vhost_user.front_end.front_end",
    "NetConfig": "vhost_user.front_end.front_end",
    "Watch": "vhost_user.front_end.watch",
    "Server": "vhost_user.back_end.server",
    "ProtocolFeature": "vhost_user.message",
    "features": "virtio.features",
    "Virtqueue": "virtio.queue",
    "Control": "virtio.state",
    "DeviceState": "virtio.state",
    "StateDelta": "virtio.state",
    "campaign": "lab.campaigns",
    "Finding": "lab.campaigns",
    "VnetdpError": "errors",
    "ConfigError": "errors",
    "MachineError": "errors",
    "EndpointError": "errors",
    "BackendError": "errors",
    "UnbindError": "errors",
    "GuestError": "errors",
}

if TYPE_CHECKING:
    from typing import Any

    from .backends.base import Backend as Backend
    from .backends.faulty import Fault as Fault
    from .backends.faulty import Faults as Faults
    from .backends.faulty import FaultyBackend as FaultyBackend
    from .backends.process import WorkerProcess as WorkerProcess
    from .backends.userspace import UserspaceBackend as UserspaceBackend
    from .backends.worker import Worker as Worker
    from .datapath.datapath import Datapath as Datapath
    from .device.device import NetDevice as NetDevice
    from .device.owners import Owner as Owner
    from .endpoints.announce import Announcer as Announcer
    from .endpoints.base import Endpoint as Endpoint
    from .endpoints.clock import Clock as Clock
    from .endpoints.fault import FaultEndpoint as FaultEndpoint
    from .endpoints.fd import FdEndpoint as FdEndpoint
    from .endpoints.frames import FrameEndpoint as FrameEndpoint
    from .endpoints.loopback import EchoEndpoint as EchoEndpoint
    from .endpoints.loopback import FrameNumbers as FrameNumbers
    from .endpoints.loopback import GenerateEndpoint as GenerateEndpoint
    from .endpoints.loopback import Ledger as Ledger
    from .endpoints.loopback import MacswapEndpoint as MacswapEndpoint
    from .endpoints.loopback import NullEndpoint as NullEndpoint
    from .endpoints.loopback import ReflectEndpoint as ReflectEndpoint
    from .endpoints.loopback import drained as drained
    from .endpoints.mailbox import MailboxEndpoint as MailboxEndpoint
    from .endpoints.pcap import PcapEndpoint as PcapEndpoint
    from .endpoints.scapy import ScapyEndpoint as ScapyEndpoint
    from .endpoints.scapy import SocketEndpoint as SocketEndpoint
    from .endpoints.scapy import VnetdpSocket as VnetdpSocket
    from .endpoints.sock import DgramEndpoint as DgramEndpoint
    from .endpoints.sock import StreamEndpoint as StreamEndpoint
    from .endpoints.spec import parse_endpoint as parse_endpoint
    from .endpoints.tap import TapEndpoint as TapEndpoint
    from .errors import BackendError as BackendError
    from .errors import ConfigError as ConfigError
    from .errors import EndpointError as EndpointError
    from .errors import GuestError as GuestError
    from .errors import MachineError as MachineError
    from .errors import UnbindError as UnbindError
    from .errors import VnetdpError as VnetdpError
    from .guest.driver import Driver as Driver
    from .guest.driver import driver_block as driver_block
    from .guest.driver import memory_for as memory_for
    from .lab.campaigns import Finding as Finding
    from .lab.campaigns import campaign as campaign
    from .shared.memory import DirtyLog as DirtyLog
    from .shared.memory import GuestMemory as GuestMemory
    from .shared.memory import Region as Region
    from .shared.memory import SharedBlock as SharedBlock
    from .shared.notify import EventFd as EventFd
    from .stepping import settle as settle
    from .vhost_user.back_end.server import Server as Server
    from .vhost_user.front_end.front_end import NetConfig as NetConfig
    from .vhost_user.front_end.front_end import VhostUserFrontEnd as VhostUserFrontEnd
    from .vhost_user.front_end.watch import Watch as Watch
    from .vhost_user.message import ProtocolFeature as ProtocolFeature
    from .virtio import features as features
    from .virtio.queue import Virtqueue as Virtqueue
    from .virtio.state import Control as Control
    from .virtio.state import DeviceState as DeviceState
    from .virtio.state import StateDelta as StateDelta
    from .warmup import warm_up as warm_up
    from .world.world import World as World
else:  # not for type checkers: to them `__getattr__` would make every name a good one, and `__all__` is no list of strings
    __all__ = [*_HOME, "__version__"]

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        home = _HOME[name]
        module = importlib.import_module(f".{home}", __name__)
        found = module if home.rpartition(".")[2] == name else getattr(module, name)
        globals()[name] = found  # next time this function is not asked
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})

    class _Former:
        """Asked by the import system for a module of ours that is not there: it may have moved."""

        @staticmethod
        def find_spec(name: str, *_: object) -> Any:
            if not name.startswith(f"{__name__}."):
                return None
            from . import moved

            return moved.find_spec(name)

    import sys

    sys.meta_path.append(_Former)
