"""What each rank of ``python -m mpisign run`` leaves behind: how it has ended, and with whom it was together.

Open MPI's mpirun exits with 0 when it loses a node, and under ``--with-ft ulfm`` on several hosts it did so after most
jobs that had failed. So each rank runs under a small shell that writes its exit code, whatever has ended it, into a
folder that all hosts share; and the library writes beside it which ranks this one goes on with, each time they change.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mpisign.group import Group

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["REQUEUE_EXIT_CODE", "is_told", "shell", "tell_group", "tell_that_it_waits"]

REQUEUE_EXIT_CODE = 85
"""What a script that has saved and stopped exits with, so that its batch script knows to requeue it."""

VARIABLE = "MPISIGN_EXIT_WORD"
"""Where this rank's go, and the process whose child it is: a rank's own children are none."""

_RANK = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$MV2_COMM_WORLD_RANK}}"
_SIZE = "${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-$MV2_COMM_WORLD_SIZE}}"

_SHELL = f"""\
word=$0/{_RANK}
export {VARIABLE}="$word $$"
trap : HUP INT TERM USR1 USR2
echo "$$" >"$word.pid"
"$@"
code=$?
echo "$code {_SIZE}" >"$word.exit"
if [ "$code" -gt 128 ]; then
    trap - HUP INT TERM USR1 USR2
    kill -"$((code - 128))" "$$"
fi
"""


def shell(folder: str, *, outlives: bool) -> list[str]:
    """What to put before a rank's command. It ends as the command does, by exit code or by signal.

    Args:
        outlives: where the others shall go on, it ends by SIGKILL if the command has failed: under ULFM a process that
            exits with a code is not taken for dead, and the others would wait for it for ever.
    """
    last = f'case $code in 0|{REQUEUE_EXIT_CODE}) ;; *) kill -KILL "$$" ;; esac\n' if outlives else ""
    return ["sh", "-c", f'{_SHELL}{last}exit "$code"\n', folder]


def is_told() -> bool:
    """Whether a shell sees how this process ends, and tells the others of any failure."""
    return bool(_word())


def _word() -> str:
    word, _, parent = os.environ.get(VARIABLE, "").rpartition(" ")
    return word if parent == str(os.getppid()) else ""


def tell_group(group: Group) -> None:
    """Write down with whom this rank goes on, if somebody wants to know."""
    _tell(group.comm, group.generation, waits=False)


def tell_that_it_waits(generation: int) -> None:
    """Write down that this rank is a spare, whose end is nobody else's."""
    from mpi4py import MPI

    _tell(MPI.COMM_SELF, generation, waits=True)


def _tell(comm: MPI.Comm, generation: int, *, waits: bool) -> None:
    word = _word()
    if not word:
        return
    from mpi4py import MPI

    members = comm.Get_group().Translate_ranks(None, MPI.COMM_WORLD.Get_group())
    told = {"generation": generation, "members": list(members), "waits": waits}
    beside = Path(f"{word}.group.new")
    try:
        beside.write_text(json.dumps(told))
        beside.replace(f"{word}.group")
    except OSError:  # the folder went with the launcher, and nobody will read it
        return
