"""mpisign.links: how long no other machine has answered, over a real link between two namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import pytest
from namespaces import needs_namespaces

from mpisign import links

HERE, THERE = (f"mpisign-links-{os.getpid()}-{number}" for number in range(2))
ADDRESSES = {HERE: "10.79.0.1", THERE: "10.79.0.2"}
ANSWERS = "import socket; s = socket.create_server(('', 7000)); print(flush=True); c = s.accept()[0]; c.recv(1)"
LISTENS = f"""\
import socket, time
from mpisign.links import Links, addresses
here, there = addresses(), [{ADDRESSES[THERE]!r}]
assert {ADDRESSES[HERE]!r} in here, here
links = Links([here, there], here)
connection = socket.create_connection((there[0], 7000))
while True:
    print([seconds for seconds in (1, 2, 3) if links.silent(seconds) == {{1}}], flush=True)
    time.sleep(0.1)
"""
PATIENCE = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def test_connections_to_others_than_the_jobs_machines_do_not_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert links.Links([["10.0.0.1"], ["10.0.0.2"]], ["10.0.0.1"]).silent(-1.0) == set()


def test_whose_machine_an_address_is() -> None:
    """A bridge that several machines have leads to none of them."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        bridge, there = "172.17.0.1", ["127.0.0.1", "10.0.0.2"]
        its = links.Links([["10.0.0.1", bridge], there, ["10.0.0.3", bridge], there], ["10.0.0.1", bridge])
        its.silent(0.0)
        assert its.silent(-1.0) == {1, 3}
        assert its.silent(60.0) == set()
        shared = links.Links([["10.0.0.1"], ["10.0.0.2", "127.0.0.1"], ["10.0.0.3", "127.0.0.1"]], ["10.0.0.1"])
        assert shared.silent(-1.0) == set()


def test_sockets_stay_as_they_are() -> None:
    """Also where Python gives new ones a time limit, and so lets their calls not wait."""
    one, other = socket.socketpair()
    with one, other:
        socket.setdefaulttimeout(30.0)
        try:
            links.Links([["10.0.0.1"], ["127.0.0.1"]], ["10.0.0.1"]).silent(1.0)
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(one.fileno())
        assert os.get_blocking(other.fileno())


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


def wait_for(said: IO[str], silences: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while json.loads(said.readline()) != silences:
        assert time.monotonic() < end


@needs_namespaces
@pytest.mark.long
def test_an_idle_machine_answers_until_its_link_is_cut(machines: None) -> None:
    with running(THERE, ANSWERS) as there:
        there.readline()
        with running(HERE, LISTENS) as said:
            silences = [json.loads(said.readline()) for _ in range(40)]
            assert not any(3 in its for its in silences), "it is asked once a second"
            ip("-n", THERE, "link", "set", "eth0", "down")
            wait_for(said, [1, 2, 3])
            ip("-n", THERE, "link", "set", "eth0", "up")
            wait_for(said, [])
