"""A rank that sends more bytes than the others expect: MPI fails on them, and they say so and end the job.

Each in a job of its own, as MPI is in no state to go on then. They are short: of messages beyond 4 KiB, Open MPI 5 on
one node writes what is too long behind the receiver's buffer before it fails (``--mca smsc ^cma`` keeps it from that).
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from mpirun import mpirun

HOSTILE = 2
PLACES = {
    "a call": ("comm.Iallgather(np.zeros(75), np.empty(225)).Wait()", "mpisign.barrier()", r"barrier\(\)"),
    "what is told": (
        "comm.Iallgather(call(4), np.empty(3 * CALL_FIELDS, np.int64)).Wait()\n"
        "    comm.Iallgatherv(np.zeros(600, np.uint8), [np.empty(608, np.uint8), [4, 4, 600]]).Wait()",
        "session.gather_bytes(b'four', 'the doctor')",
        "the doctor",
    ),
    "what the root tells": (
        "comm.Iallgather(call(4), np.empty(3 * CALL_FIELDS, np.int64)).Wait()\n"
        "    comm.Ibcast(np.zeros(600, np.uint8), root=2).Wait()",
        "session.spread_bytes(b'', 2, 'the doctor')",
        "the doctor",
    ),
    "the time": (
        "comm.Send(np.zeros(9), 0, CLOCK_TAG)",
        "session.align_clocks()",
        "the alignment of clocks",
    ),
    "a notice": (
        "comm.Send(np.zeros(300, np.uint8), 0, TAG)\n    comm.Send(np.zeros(300, np.uint8), 1, TAG)",
        "mpisign.barrier()",
        None,
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
def test_a_message_that_is_too_long_is_an_error_that_ends_the_job(tmp_path: Path, place: str) -> None:
    sent, done, where = PLACES[place]
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            import numpy as np
            import mpisign
            from mpisign.presence import TAG
            from mpisign.session import current
            from mpisign.talk import ACTS, CALL_FIELDS, CLOCK_TAG

            def call(size):
                return np.array([-2 - ACTS.index("the doctor"), size, *[0] * (CALL_FIELDS - 2)], np.int64)

            mpisign.init()
            session = current()
            comm = session.group.comm
            if session.rank == 2:
                {}
                time.sleep(600)
            {}
            print("rank", session.rank, "goes on", flush=True)
            time.sleep(600)
            """
        ).format(sent, done)
    )
    ended = mpirun(3, script, timeout=90.0)
    assert ended.returncode != 0
    if where is None:
        said = rf"rank {HOSTILE} has sent 300 bytes that are no notice"
    else:
        said = rf"rank [01] of 3: MPI has failed in {where}: .*A rank has sent\s+something else than the others expect"
    assert re.search(rf"ConsistencyError: {said}", ended.text), ended.text
