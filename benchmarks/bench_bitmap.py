"""How fast the host packs signs, applies decisions and counts votes, measured against copying the vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from harness import Contender, Report, Table, Target, Times, compare, count, measure, one_thread, parser

from mpisign.backends import WORD, Backend
from mpisign.backends import host as numpy_backend
from mpisign.backends import native as native_backend
from mpisign.bitmap import host, native
from mpisign.bitmap.coin import coin_key
from mpisign.bitmap.tensors import raw_bits

Words = npt.NDArray[np.uint32]

COPY = "np.copyto"
NUMPY_PACK, TORCH_PACK = "np.packbits(x >= 0)", "torch pack"
NUMPY_UNPACK, TORCH_UNPACK, UNPACK_AND_SGD = "np.unpackbits", "torch unpack", "unpack, then SGD"
RATE, DECAY = 1e-4, 0.1

KEY = coin_key(seed=0, step=0, stream=0)

C, NUMPY = "C", "NumPy"

WORDS = """\
One process. The yardstick is `np.copyto` of the gradient on one thread: it reads and writes the vector once. Each
operation is done by both of the library's backends for the host, `C` (compiled at installation) and `NumPy`, on one
thread and, for `C, 2 threads`, on two. `pack` does more than `np.packbits(x >= 0)`: it settles exact zeros by the
chosen policy and finds NaN and Inf. `momentum + pack` is all of Signum's way down: the gradient is checked and taken
into the momentum, whose signs are packed. `apply` is all of the way back: signs become a step of SGD with weight decay
on the parameter; its rival is `unpack`, and then torch's own SGD. The other rivals are what one writes with NumPy or
torch without this library; they skip zeros and NaN. `Rate` counts bytes that must cross memory: 1.00 is as many bytes
a second as the copy moves."""

BYTES = {  # read and written for each fp32 coordinate, besides an eighth for each bitmap
    COPY: 8.0,
    "pack": 4.125,
    "pack, 10 % zeros": 4.25,
    "pack, 90 % zeros": 4.25,
    "momentum + pack": 12.125,
    "unpack": 4.125,
    "unpack, two planes": 4.25,
    "apply": 8.125,
}


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "python benchmarks/bench_bitmap.py",
            "python benchmarks/bench_bitmap.py --elements 4M --dtype bfloat16 --ranks 3 16",
            "python benchmarks/bench_bitmap.py --report",
        ],
    )
    options.add_argument("--elements", type=count, default=25_600_000, help="coordinates of the gradient")
    dtypes = ("float32", "float64", "float16", "bfloat16")
    options.add_argument("--dtype", choices=dtypes, default="float32", help="type of the gradient")
    options.add_argument("--ranks", type=count, nargs="+", default=[8, 7], help="how many bitmaps to decide, up to 127")
    args = options.parse_args()
    one_thread()

    values = torch.randn(args.elements, generator=torch.Generator().manual_seed(0)).to(getattr(torch, args.dtype))
    raw = raw_bits(values)
    copy = np.empty_like(raw)
    copying = Contender(COPY, "copy the gradient", lambda: np.copyto(copy, raw))
    packing, unpacking = packers(values), unpackers(values)
    votes = {ranks: counters(ranks, args.elements) for ranks in args.ranks}
    contenders = [copying, *packing, *unpacking, *(one for counting in votes.values() for one in counting)]
    times = measure(contenders, args.rounds, args.warmup)

    size = f"{args.elements:,} x {args.dtype}"
    tables = [
        compare(f"Pack {size}", times, names([copying, *packing]), present(times, COPY, NUMPY_PACK, TORCH_PACK)),
        compare(
            f"Unpack and apply {size}",
            times,
            names([copying, *unpacking]),
            present(times, COPY, NUMPY_UNPACK, TORCH_UNPACK, UNPACK_AND_SGD),
        ),
        *(
            compare(
                f"Decide {ranks} bitmaps of {args.elements:,} bits",
                times,
                names([copying, *counting]),
                [COPY, *(name for name in names(counting) if not name.startswith("majority"))],
            )
            for ranks, counting in votes.items()
        ),
    ]
    targets = []
    if C in BACKENDS:
        targets = [Target(f"{name}, {C}", COPY, at_least) for name, at_least in TARGETS.items()]
        targets += [Target(f"majority of 8, {C}", COPY, 2.0)] if 8 in votes else []
        targets += [Target(f"{name}, {C}, 2 threads", f"{name}, {C}", 1.6) for name in ("pack", "momentum + pack")]
    if args.dtype == "float32":
        tables.append(rates(times))
    report = Report("bitmap", "Bit arithmetic on the host", WORDS, args, contenders, times, targets, tables)
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


BACKENDS: dict[str, Backend] = {C: native_backend.BACKEND} if native.library() is not None else {}
BACKENDS[NUMPY] = numpy_backend.BACKEND

# In copies: a copy moves 8 bytes a coordinate.
TARGETS = {
    "pack": 1.84,  # 0.95 times its rate
    "pack, 10 % zeros": 1.79,
    "pack, 90 % zeros": 1.79,
    "momentum + pack": 0.57,  # 1.15 times the time of as many bytes
    "apply": 0.86,
}


def on(threads: int, work: Callable[[], object]) -> Callable[[], object]:
    """``work`` with so many threads of torch, and of the C library."""
    if threads == 1:
        return work

    def run() -> None:
        torch.set_num_threads(threads)
        work()
        torch.set_num_threads(1)

    return run


def by_backends(name: str, what: str, make: Callable[[Backend], Callable[[], object]]) -> list[Contender]:
    """One thing as each backend does it, and C on two threads."""
    made = []
    for backend, does in BACKENDS.items():
        made.append(Contender(f"{name}, {backend}", f"{what}; {backend}", make(does)))
        if backend == C:
            made.append(Contender(f"{name}, {C}, 2 threads", f"{what}; {C}", on(2, make(does))))
    return made


def rates(times: Times) -> Table:
    """How near to a copy's bytes a second each operation is."""
    rows = []
    copied = np.median(times[COPY]) / BYTES[COPY]
    for name, moved in BYTES.items():
        for contender, seconds in times.items():
            if contender == name or contender.startswith((f"{name}, {C}", f"{name}, {NUMPY}")):
                rate = copied * moved / float(np.median(seconds))
                rows.append([contender, f"{moved:g}", f"{rate:.2f}"])
    return Table("Bytes that must cross memory", ["", "bytes a coordinate", "Rate, copies"], rows)


def names(contenders: Sequence[Contender]) -> list[str]:
    return [one.name for one in contenders]


def present(times: Times, *names: str) -> list[str]:
    """Those that ran: NumPy has no bfloat16."""
    return [name for name in names if name in times]


def require_equal(what: str, ours: npt.NDArray[np.generic], theirs: npt.NDArray[np.generic]) -> None:
    """A rival that computes something else is no rival."""
    if not np.array_equal(ours, theirs):
        raise RuntimeError(f"{what} gives other results than mpisign.bitmap.host")


# ---------------------------------------------------------------------------------------------- packing


def packers(values: torch.Tensor) -> list[Contender]:
    n = values.numel()
    words, nonzero = (torch.empty(host.words_for(n), dtype=WORD) for _ in range(2))

    def pack(
        source: torch.Tensor, zeros: str, plane: torch.Tensor | None = None
    ) -> Callable[[Backend], Callable[[], object]]:
        return lambda backend: lambda: backend.pack(source, words, zeros=zeros, key=KEY, nonzero=plane)

    def gaps(share: float) -> torch.Tensor:
        return values.masked_fill(torch.rand(n, generator=torch.Generator().manual_seed(1)) < share, 0)

    average = torch.zeros(n, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)

    def momentum(backend: Backend) -> Callable[[], object]:
        bitmaps = backend.bitmaps([n], [words], [None], [0])
        averages = [average]
        return lambda: bitmaps.pack_average([values], averages, (0.9, 0.9), unscale=1.0, zeros="coin", key=KEY)

    contenders = [
        *by_backends("pack", "`zeros='coin'`; normal data, almost no zeros", pack(values, "coin")),
        *by_backends(
            "pack, 10 % zeros", "`zeros='rows'`, the default; a tenth exactly 0", pack(gaps(0.1), "rows", nonzero)
        ),
        *by_backends("pack, 90 % zeros", "the same, nine tenths exactly 0", pack(gaps(0.9), "rows", nonzero)),
        *by_backends("momentum + pack", "check, momentum of 0.9, and pack its signs", momentum),
    ]
    as_words = words.numpy().view(np.uint32)
    BACKENDS[NUMPY].pack(values, words, zeros="positive")
    expected = as_words.view(np.uint8)[: (n + 7) // 8].copy()
    if values.dtype != torch.bfloat16:
        array = values.numpy()
        contenders.append(
            Contender(
                NUMPY_PACK,
                "`np.packbits(x >= 0, bitorder='little')`, neither zeros nor NaN",
                lambda: np.packbits(array >= 0, bitorder="little"),
            )
        )
        require_equal(NUMPY_PACK, expected, np.packbits(array >= 0, bitorder="little"))
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    whole = values[: n - n % 8]

    def torch_pack() -> torch.Tensor:
        return ((whole >= 0).view(-1, 8) * powers).sum(1, dtype=torch.uint8)

    require_equal(TORCH_PACK, expected[: n // 8], torch_pack().numpy())
    contenders.append(Contender(TORCH_PACK, "`((x >= 0).view(-1, 8) * powers_of_two).sum(1)`", torch_pack))
    return contenders


# -------------------------------------------------------------------------------------------- unpacking


def unpackers(values: torch.Tensor) -> list[Contender]:
    n, dtype = values.numel(), values.dtype
    k = host.words_for(n)
    both = ballots(2, n)
    words, nonzero = (torch.from_numpy(plane.view(np.int32)) for plane in both)
    out, parameter = torch.empty_like(values), torch.nn.Parameter(torch.zeros_like(values))
    decay = DECAY if dtype in (torch.float32, torch.float64) else 0.0
    sgd = torch.optim.SGD([parameter], lr=RATE, weight_decay=decay)
    parameter.grad = out

    def apply(backend: Backend) -> Callable[[], object]:
        bitmaps = backend.bitmaps([n], [words], [None], [0])
        return lambda: bitmaps.apply([parameter.detach()], [RATE], [decay], [None])

    def unpack_and_step() -> None:
        numpy_backend.BACKEND.unpack(words, out)
        sgd.step()

    contenders = [
        *by_backends("unpack", "signs to +-1, into the gradient", lambda backend: lambda: backend.unpack(words, out)),
        *by_backends(
            "unpack, two planes",
            "+-1, and 0 where the second plane says so (`zeros='abstain'`, `ties='zero'`)",
            lambda backend: lambda: backend.unpack(words, out, nonzero=nonzero),
        ),
        *by_backends("apply", "signs to a step of SGD on the parameter", apply),
        Contender(UNPACK_AND_SGD, "`unpack` by NumPy, then `torch.optim.SGD.step()`", unpack_and_step),
    ]
    raw = raw_bits(out)
    numpy_backend.BACKEND.unpack(words, out)
    as_bytes = both[0].view(np.uint8)
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.bfloat16:

        def numpy_unpack() -> npt.NDArray[np.generic]:
            return np.unpackbits(as_bytes, count=n, bitorder="little").astype(name) * 2 - 1

        require_equal(NUMPY_UNPACK, raw, numpy_unpack().view(raw.dtype))
        contenders.append(Contender(NUMPY_UNPACK, "`np.unpackbits(bits).astype(dtype) * 2 - 1`", numpy_unpack))
    packed, places = torch.from_numpy(as_bytes[: 4 * k]), torch.arange(8, dtype=torch.uint8)

    def torch_unpack() -> torch.Tensor:
        bits = (packed[:, None] >> places) & 1
        return bits.view(-1)[:n].to(dtype) * 2 - 1

    require_equal(TORCH_UNPACK, raw, raw_bits(torch_unpack()))
    contenders.append(Contender(TORCH_UNPACK, "`((bytes[:, None] >> arange(8)) & 1).to(dtype) * 2 - 1`", torch_unpack))
    return contenders


# ---------------------------------------------------------------------------------------------- deciding


def ballots(ranks: int, elements: int) -> Words:
    """(ranks, k) random bitmaps: the tightest votes there are, with as many ties as can be expected."""
    return np.random.default_rng(2).integers(0, 2**32, (ranks, host.words_for(elements)), np.uint32)


def counters(ranks: int, elements: int) -> list[Contender]:
    bitmaps = ballots(ranks, elements)
    bits = 32 * bitmaps.shape[1]
    out = np.empty_like(bitmaps[0])
    as_bytes = bitmaps.view(np.uint8)
    signs = np.stack([2 * np.unpackbits(row, bitorder="little").view(np.int8) - 1 for row in as_bytes])
    tensor = torch.from_numpy(signs)

    def expand() -> npt.NDArray[np.uint8]:
        total = np.zeros(bits, np.uint8)
        for row in as_bytes:
            total += np.unpackbits(row, bitorder="little")
        return np.packbits(total > ranks // 2, bitorder="little")

    def add() -> npt.NDArray[np.bool_]:
        total: npt.NDArray[np.int8] = signs.sum(axis=0, dtype=np.int8)
        return np.greater(total, 0)

    def torch_add() -> torch.Tensor:
        return tensor.sum(0, dtype=torch.int8) > 0

    # Ties go to -1 in the rivals, so let nobody have +1 in one.
    tied = np.empty_like(out)
    host.majority(list(bitmaps), out, ties="zero", out_nonzero=tied)
    expected = (out & tied).view(np.uint8)
    for name, decided in (
        ("expand", expand()),
        ("int8", np.packbits(add(), bitorder="little")),
        ("torch", np.packbits(torch_add().numpy(), bitorder="little")),
    ):
        require_equal(name, expected, decided)
    tensors = [torch.from_numpy(row.view(np.int32)) for row in bitmaps]
    into = torch.from_numpy(out.view(np.int32))
    return [
        *by_backends(
            f"majority of {ranks}",
            "bit-sliced counters on whole words, `ties='coin'`",
            lambda backend: lambda: backend.majority(tensors, into, ties="coin", key=KEY),
        ),
        Contender(f"unpackbits sum of {ranks}", "`np.unpackbits` each bitmap, add, `np.packbits(total > M/2)`", expand),
        Contender(f"int8 sum of {ranks}", "one int8 for each vote: `votes.sum(0, dtype=int8) > 0`", add),
        Contender(f"torch int8 sum of {ranks}", "the same in torch: `votes.sum(0, dtype=torch.int8) > 0`", torch_add),
    ]


if __name__ == "__main__":
    main()
