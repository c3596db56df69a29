"""mpisign.links: how long no other machine has answered, over a real link between two namespaces."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO

import pytest
from namespaces import needs_namespaces

from mpisign import links

HERE, THERE = "mpisign-links-0", "mpisign-links-1"
ADDRESSES = {HERE: "10.79.0.1", THERE: "10.79.0.2"}
ANSWERS = "import socket; s = socket.create_server(('', 7000)); print(flush=True); c = s.accept()[0]; c.recv(1)"
LISTENS = f"""\
import socket, time
from mpisign import links
connection = socket.create_connection(({ADDRESSES[THERE]!r}, 7000))
while True:
    print(links.silence(), flush=True)
    time.sleep(0.1)
"""
PATIENCE = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def test_connections_inside_this_machine_do_not_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert links.silence() is None


@pytest.fixture
def machines() -> Iterator[None]:
    """Two, with a link between them."""
    with contextlib.ExitStack() as stack:
        for name in ADDRESSES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("-n", HERE, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", THERE)
        for name, address in ADDRESSES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield


@contextlib.contextmanager
def running(name: str, program: str) -> Iterator[IO[str]]:
    """What it prints, line by line."""
    command = ["ip", "netns", "exec", name, sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


def wait_for(said: IO[str], condition: Callable[[float], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition(float(said.readline())):
        assert time.monotonic() < end


@needs_namespaces
def test_an_idle_machine_answers_until_its_link_is_cut(machines: None) -> None:
    with running(THERE, ANSWERS) as there:
        there.readline()
        with running(HERE, LISTENS) as said:
            silences = [float(said.readline()) for _ in range(40)]
            assert max(silences[20:]) < 2.5, "it is asked once a second"
            ip("-n", THERE, "link", "set", "eth0", "down")
            wait_for(said, lambda seconds: seconds > 3.0)
            ip("-n", THERE, "link", "set", "eth0", "up")
            wait_for(said, lambda seconds: seconds < 1.0)
