"""What all ranks did and when, as one trace for Perfetto or ``chrome://tracing``: a row per rank and phase."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisign import encoding
from mpisign.errors import MpisignError
from mpisign.talk import Talk
from mpisign.trace import OTHER, PHASE_OF, PHASES, Span

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["RECORDED", "VARIABLE", "wanted", "write"]

logger = logging.getLogger(__name__)

ACT = "timeline()"
VARIABLE = "MPISIGN_TIMELINE"
RECORDED = 500_000  # spans that each rank keeps where rank 0 has the variable; about 80 MB
LIMIT_BYTES = 512 << 20
NAME_LENGTH = 200
COLUMNS = 5  # name, step, message, begin, end
ROWS = (*PHASES, OTHER)


def wanted(comm: MPI.Comm) -> str:
    """What the variable says, or "". If that cannot be written, the log says so, and not only after the training.

    Args:
        comm: the job's ranks, of which this one is rank 0. If they are not all of MPI's, other jobs may have the same
            variable, and this rank's number among all follows the file's stem.
    """
    from mpi4py import MPI

    path = os.environ.get(VARIABLE, "")
    folder = Path(path).parent
    if path and comm.Get_size() < MPI.COMM_WORLD.Get_size():
        stem, suffix = os.path.splitext(path)
        path = f"{stem}-{MPI.COMM_WORLD.Get_rank()}{suffix}"
    if path and not os.access(folder, os.W_OK | os.X_OK):
        logger.warning("%s=%r: %s is no folder that rank 0 may write to", VARIABLE, path, folder)
    return path


def write(talk: Talk, path: str | os.PathLike[str]) -> None:
    """Gather the ranks' spans and let rank 0 write them. **Collective.**

    Ranks' clocks are aligned by how far apart they were each time that ``talk.clocks`` has noted, in a straight line
    between, so that drift is taken out.

    Raises:
        MpisignError: on every rank, if rank 0 cannot write.
        TypeError: ``path`` is none.
    """
    with talk.telling(ACT):
        path = os.fsdecode(path)
    talk.meet(ACT)
    with talk.telling(ACT):
        talk.align_clocks()
        spans = talk.tracer.spans()
        names = list(dict.fromkeys(span.name for span in spans))
        table = _aligned(spans, names, talk.clocks).tobytes()
    told = talk.gather_bytes(encoding.encode(names), ACT, root=0)
    tables = talk.gather_bytes(table, ACT, LIMIT_BYTES, root=0)
    problem = ""
    if talk.rank == 0:
        try:
            _write(Path(path), [_events(rank, *both) for rank, both in enumerate(zip(told, tables, strict=True))])
        except Exception as error:  # whatever it is, the others must hear of it
            problem = f"{type(error).__name__}: {error}"
    problem = talk.spread_value(problem, str, 0, ACT)
    if problem:
        raise MpisignError(f"timeline({path!r}): rank 0 cannot write it: {encoding.printable(problem)}")


def _aligned(spans: Sequence[Span], names: Sequence[str], clocks: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """(n, 5) int64: number of the name, step, message, begin and end in nanoseconds of rank 0's clock."""
    place = {name: number for number, name in enumerate(names)}
    table = np.array([(place[s.name], s.step, s.message, s.begin, s.end) for s in spans], np.int64).reshape(-1, COLUMNS)
    moments, ahead = np.array(clocks, np.int64).T
    origin = moments[0]  # floats hold nanoseconds of hours, not of years
    shift = np.interp(table[:, 3] - origin, moments - origin, ahead - ahead[0]).astype(np.int64) + ahead[0]
    table[:, 3:] += shift[:, None]
    return table


def _events(rank: int, told: bytes, table: bytes) -> Iterator[dict[str, Any]]:
    """A rank's rows and spans, in the format of Chrome's trace events; checked, as another rank has sent them."""
    names = encoding.decode(told, [str], rank)
    if any(len(name) > NAME_LENGTH for name in names):  # each is written once a span
        raise MpisignError(f"rank {rank} has sent the name of a span that is longer than {NAME_LENGTH}")
    if len(table) % (8 * COLUMNS):
        raise MpisignError(f"rank {rank} has sent {len(table)} bytes, which are no spans")
    rows = np.frombuffer(table, np.int64).reshape(-1, COLUMNS)
    if rows.size and not (rows[:, 0].min() >= 0 and rows[:, 0].max() < len(names)):
        raise MpisignError(f"rank {rank} has sent spans without names")
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for row, phase in enumerate(ROWS):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": phase}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": row, "args": {"sort_index": row}}
    for number, step, message, begin, end in rows.tolist():
        name = names[number]
        yield {
            "ph": "X",
            "name": name,
            "cat": "mpisign",
            "pid": rank,
            "tid": ROWS.index(PHASE_OF.get(name, OTHER)),
            "ts": begin / 1000,
            "dur": (end - begin) / 1000,
            "args": {key: value for key, value in (("step", step), ("bucket", message)) if value >= 0},
        }


def _write(path: Path, ranks: Sequence[Iterator[dict[str, Any]]]) -> None:
    """Raises OSError; a file that was there is whole until the new one is."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another job may write to the same path
    for there in (path, unfinished):
        if there.exists() and not there.is_file():  # a pipe would wait for a reader, and a device be replaced
            raise FileExistsError(f"{there} is no regular file")
    try:
        with unfinished.open("w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            first = True
            for events in ranks:
                for event in events:
                    file.write(("" if first else ",\n") + json.dumps(event))
                    first = False
            file.write("\n]}\n")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
