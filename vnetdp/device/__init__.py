"""The device as its driver sees it; read `device` first."""

from .device import NetDevice as NetDevice
