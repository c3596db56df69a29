"""The TCP connections of this process to a job's other machines, by which it finds which of them it cannot reach.

Linux answers for a machine, not for its processes: who is stopped, or computes, is not silent.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Links", "addresses"]

DESCRIPTORS = Path("/proc/self/fd")
OF_4, OF_6 = Path("/proc/net/fib_trie"), Path("/proc/net/if_inet6")
SO_PROTOCOL, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT = 38, 4, 5, 6  # Linux's
ASKED_SECONDS = 1  # from one question whether the other machine lives to the next, by its kernel
UNANSWERED = 127  # until a connection is given up, which is not decided here
ESTABLISHED = 1
INFO = struct.Struct("@B51x2I")  # Linux's tcp_info: the state; ms since data and since an answer have come


def addresses() -> list[str]:
    """This machine's own, but for those that every machine has; none where it is no Linux."""
    found = set()
    with contextlib.suppress(OSError):
        lines = OF_4.read_text().splitlines()
        found |= {one.split()[-1] for one, its in itertools.pairwise(lines) if "/32 host LOCAL" in its}
    with contextlib.suppress(OSError):
        found |= {str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in OF_6.read_text().splitlines()}
    return sorted(its for its in found if not ipaddress.ip_address(its).is_loopback)


class Links:
    """Those of a job.

    Args:
        machines: by rank, the addresses of its machine.
        here: those of this one.
    """

    def __init__(self, machines: Sequence[Sequence[str]], here: Sequence[str]) -> None:
        self._ranks_at: dict[str, frozenset[int]] = {}
        for address in {its for machine in machines for its in machine} - set(here):
            ranks = [rank for rank, machine in enumerate(machines) if address in machine]
            if len({tuple(machines[rank]) for rank in ranks}) == 1:  # else it is a bridge's, as many machines have
                self._ranks_at[address] = frozenset(ranks)

    def silent(self, seconds: float) -> set[int]:
        """The ranks of machines that are connected, and from which nothing has come for so long."""
        least: dict[frozenset[int], float] = {}
        for ranks, silence in self._silences():
            least[ranks] = min(silence, least.get(ranks, silence))
        return {rank for ranks, silence in least.items() if silence > seconds for rank in ranks}

    def _silences(self) -> Iterator[tuple[frozenset[int], float]]:
        """For each connection, whose machine it leads to, and seconds since anything has come."""
        try:
            names = os.listdir(DESCRIPTORS) if self._ranks_at else []
        except OSError:  # no Linux
            return
        for name in names:
            with contextlib.suppress(OSError, struct.error):  # closed since, or no TCP
                if os.readlink(DESCRIPTORS / name).startswith("socket:"):
                    ranks = self._ranks_at.get(_peer(int(name)))
                    if ranks is not None and (silence := _silence(int(name))) is not None:
                        yield ranks, silence


# ------------------------------------------------------------------------------------------- sockets, by number

# A Python socket made of a number may change what belongs to all who have it, such as whether its calls wait.


def _silence(number: int) -> float | None:
    """Seconds since anything has come; None of what is no TCP connection."""
    if int.from_bytes(_option(number, socket.SOL_SOCKET, SO_PROTOCOL, 4), sys.byteorder) != socket.IPPROTO_TCP:
        return None
    state, data, answer = INFO.unpack(_option(number, socket.IPPROTO_TCP, socket.TCP_INFO, INFO.size))
    if state != ESTABLISHED:
        return None
    if int.from_bytes(_option(number, socket.IPPROTO_TCP, TCP_KEEPIDLE, 4), sys.byteorder) != ASKED_SECONDS:
        for name, value in ((TCP_KEEPIDLE, ASKED_SECONDS), (TCP_KEEPINTVL, ASKED_SECONDS), (TCP_KEEPCNT, UNANSWERED)):
            _set_option(number, socket.IPPROTO_TCP, name, value)
        _set_option(number, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return 0.0  # nobody was asked before
    return float(min(data, answer)) / 1e3


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _peer(number: int) -> str:
    """The address at the other end."""
    raw, length = ctypes.create_string_buffer(128), ctypes.c_uint32(128)
    _check(_library().getpeername(number, raw, ctypes.byref(length)))
    family = int.from_bytes(raw.raw[:2], sys.byteorder)
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(raw.raw[4:8]))
    if family == socket.AF_INET6:
        its = ipaddress.IPv6Address(raw.raw[8:24])
        return str(its.ipv4_mapped or its)
    return ""


def _option(number: int, level: int, name: int, size: int) -> bytes:
    raw, length = ctypes.create_string_buffer(size), ctypes.c_uint32(size)
    _check(_library().getsockopt(number, level, name, raw, ctypes.byref(length)))
    return raw.raw[: length.value]


def _set_option(number: int, level: int, name: int, value: int) -> None:
    _check(_library().setsockopt(number, level, name, ctypes.byref(ctypes.c_int(value)), 4))


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
