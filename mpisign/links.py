"""The TCP connections of this process to other machines, by which it finds that it can reach none of them any more."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["silence"]

DESCRIPTORS = Path("/proc/self/fd")
KEEP_ALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 127}
"""Each second the other machine's kernel is asked for a sign of life, and no connection is given up."""
ESTABLISHED = 1
LAST_RECEIVED = struct.Struct("@B51x2I")  # of Linux's tcp_info: the state; ms since data and since an answer have come


def silence() -> float | None:
    """Seconds since anything has come from another machine, however idle this process is.

    Linux answers for a machine, not for its processes: who is stopped is not silent.

    Returns:
        None where no other machine is connected, as with networks that use no TCP.
    """
    return min(map(_silent_for, _connections()), default=None)


def _connections() -> Iterator[socket.socket]:
    """Each while it is looked at."""
    try:
        names = os.listdir(DESCRIPTORS)
    except OSError:  # no Linux
        return
    for name in names:
        with contextlib.suppress(OSError):  # closed since
            if not os.readlink(DESCRIPTORS / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as its:
                if _leads_elsewhere(its):
                    yield its


def _leads_elsewhere(its: socket.socket) -> bool:
    if its.type != socket.SOCK_STREAM or its.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    here, there = (ipaddress.ip_address(name[0].partition("%")[0]) for name in (its.getsockname(), its.getpeername()))
    return here != there and not there.is_loopback


def _silent_for(its: socket.socket) -> float:
    if not its.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        for name, value in KEEP_ALIVE.items():
            its.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        its.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw = its.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LAST_RECEIVED.size)
    state, data, answer = LAST_RECEIVED.unpack(raw)
    return min(data, answer) / 1e3 if state == ESTABLISHED else float("inf")
