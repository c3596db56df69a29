"""How fast one core packs signs, unpacks decisions and counts votes, measured against copying the vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from harness import Contender, Report, Target, Times, compare, count, measure, one_thread, parser

from mpisign.bitmap import host
from mpisign.bitmap.coin import coin_key
from mpisign.bitmap.host import FloatFormat
from mpisign.bitmap.tensors import format_of, raw_bits

Bits = npt.NDArray[np.unsignedinteger]
Words = npt.NDArray[np.uint32]

COPY = "np.copyto"
NUMPY_PACK, TORCH_PACK = "np.packbits(x >= 0)", "torch pack"
NUMPY_UNPACK, TORCH_UNPACK = "np.unpackbits", "torch unpack"

KEY = coin_key(seed=0, step=0, stream=0)

WORDS = """\
One process on one thread. The yardstick is `np.copyto` of the gradient: it reads and writes the vector once, so
nothing that must look at every element is much faster. `pack` does more than `np.packbits(x >= 0)`: it settles
exact zeros by the chosen policy and refuses NaN and Inf. The rivals are what one writes with NumPy or torch
without this library; they skip both. A target of 0.5 times a copy's speed is twice its time."""


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
    raw, fmt = raw_bits(values), format_of(values.dtype)
    copy = np.empty_like(raw)
    copying = Contender(COPY, "copy the gradient", lambda: np.copyto(copy, raw))
    packing = packers(values)
    unpacking = unpackers(raw, fmt)
    votes = {ranks: counters(ranks, args.elements) for ranks in args.ranks}
    contenders = [copying, *packing, *unpacking, *(one for counting in votes.values() for one in counting)]
    times = measure(contenders, args.rounds, args.warmup)

    size = f"{args.elements:,} x {args.dtype}"
    tables = [
        compare(f"Pack {size}", times, names([copying, *packing]), present(times, COPY, NUMPY_PACK, TORCH_PACK)),
        compare(
            f"Unpack {size}", times, names([copying, *unpacking]), present(times, COPY, NUMPY_UNPACK, TORCH_UNPACK)
        ),
        *(
            compare(
                f"Decide {ranks} bitmaps of {args.elements:,} bits",
                times,
                names([copying, *counting]),
                [COPY, *names(counting)[1:]],
            )
            for ranks, counting in votes.items()
        ),
    ]
    targets = [Target(name, COPY, 0.7) for name in ("pack", "pack, 10 % zeros", "unpack")]
    targets += [Target("majority of 8", COPY, 0.5)] if 8 in votes else []
    report = Report("bitmap", "Bit arithmetic on one core", WORDS, args, contenders, times, targets, tables)
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


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
    n, raw, fmt = values.numel(), raw_bits(values), format_of(values.dtype)
    some = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.1
    gaps = raw_bits(values.masked_fill(some, 0))
    words, nonzero = np.empty(host.words_for(n), np.uint32), np.empty(host.words_for(n), np.uint32)

    def pack(source: Bits, zeros: str) -> Callable[[], object]:
        plane = nonzero if zeros == "abstain" else None
        return lambda: host.pack(source, fmt, words, zeros=zeros, key=KEY, nonzero=plane)

    contenders = [
        Contender("pack", "`zeros='coin'`, the default; normal data, almost no zeros", pack(raw, "coin")),
        Contender("pack, 10 % zeros", "`zeros='coin'`, a tenth of the data exactly 0", pack(gaps, "coin")),
        Contender("pack, 10 % abstain", "`zeros='abstain'`, same data, two planes", pack(gaps, "abstain")),
        Contender("pack, positive", "`zeros='positive'`, normal data", pack(raw, "positive")),
    ]
    pack(raw, "positive")()
    expected = words.view(np.uint8)[: (n + 7) // 8]
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


def unpackers(raw: Bits, fmt: FloatFormat) -> list[Contender]:
    n, k = raw.size, host.words_for(raw.size)
    words, nonzero = ballots(2, n)
    out = np.empty_like(raw)
    contenders = [
        Contender("unpack", "signs to +-1, into the gradient", lambda: host.unpack(words, fmt, out)),
        Contender(
            "unpack, two planes",
            "+-1, and 0 where the second plane says so (`zeros='abstain'`, `ties='zero'`)",
            lambda: host.unpack(words, fmt, out, nonzero=nonzero),
        ),
    ]
    as_bytes = words.view(np.uint8)
    host.unpack(words, fmt, out)
    if fmt.name != "bfloat16":

        def numpy_unpack() -> npt.NDArray[np.generic]:
            return np.unpackbits(as_bytes, count=n, bitorder="little").astype(fmt.name) * 2 - 1

        require_equal(NUMPY_UNPACK, out, numpy_unpack().view(raw.dtype))
        contenders.append(Contender(NUMPY_UNPACK, "`np.unpackbits(bits).astype(dtype) * 2 - 1`", numpy_unpack))
    packed, places = torch.from_numpy(as_bytes[: 4 * k]), torch.arange(8, dtype=torch.uint8)

    def torch_unpack() -> torch.Tensor:
        bits = (packed[:, None] >> places) & 1
        return bits.view(-1)[:n].to(getattr(torch, fmt.name)) * 2 - 1

    require_equal(TORCH_UNPACK, out, raw_bits(torch_unpack()))
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
    return [
        Contender(
            f"majority of {ranks}",
            "bit-sliced counters on whole words, `ties='coin'`",
            lambda: host.majority(list(bitmaps), out, ties="coin", key=KEY),
        ),
        Contender(f"unpackbits sum of {ranks}", "`np.unpackbits` each bitmap, add, `np.packbits(total > M/2)`", expand),
        Contender(f"int8 sum of {ranks}", "one int8 for each vote: `votes.sum(0, dtype=int8) > 0`", add),
        Contender(f"torch int8 sum of {ranks}", "the same in torch: `votes.sum(0, dtype=torch.int8) > 0`", torch_add),
    ]


if __name__ == "__main__":
    main()
