"""How fast one GPU packs signs, counts votes and unpacks decisions, measured against its own copying of memory."""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from bench_step import resnet50_shapes
from harness import Contender, Report, Table, Target, Times, compare, count, measure, parser

from mpisign.backends import WORD
from mpisign.bitmap import cuda, kernels
from mpisign.bitmap.batch import Batch
from mpisign.bitmap.coin import coin_key
from mpisign.bitmap.host import words_for

Tensor = torch.Tensor

COPY, PACK, UNPACK, PACK_BF16, PACK_MOMENTUM = "copy", "pack", "unpack", "pack, bf16", "momentum and pack"
PACK_ROWS = "pack, rows"
LERP = "torch lerp_, then pack"
RESNET_PACK, RESNET_UNPACK = "ResNet-50 pack", "ResNet-50 unpack"
RESNET_PACK_CALL, RESNET_UNPACK_CALL = "ResNet-50 pack, the call", "ResNet-50 unpack, the call"

SHARE = 0.85  # of the copy's bandwidth
DECIDED = 8  # times as many coordinates, as their bitmaps are so small that launches would weigh
PUBLISHED = 5.27e-9  # seconds a float on a V100, encode and decode, by the signSGD paper's code
KEY = coin_key(seed=0, step=0, stream=0)

WORDS = """\
One GPU. The yardstick is copying the gradient within the GPU's memory; the share of its bandwidth counts the bytes that
must be read and written, each once. The targets are 85 % of that bandwidth, written as times: packing fp32 moves 4.1
bytes an element and copying it 8, so it must be 1.65 times as fast. What is decided are bitmaps of {decided} times as
many coordinates. Data are several times larger than the cache. A run is {repeats} launches and one synchronisation;
times in the tables are those of a run. The rivals are what one writes with torch or CuPy without this library: they
settle neither zeros nor NaN."""


def main() -> None:
    options = parser(
        __doc__ or "",
        [
            "python benchmarks/bench_bitmap_gpu.py",
            "python benchmarks/bench_bitmap_gpu.py --elements 400M --ballots 16",
            "python benchmarks/bench_bitmap_gpu.py --report",
        ],
    )
    options.add_argument("--elements", type=count, default=100_000_000, help="coordinates of the gradient")
    options.add_argument("--ballots", type=count, default=8, help="how many bitmaps to decide")
    options.add_argument("--repeats", type=count, default=10, help="launches in a timed run")
    args = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_bitmap_gpu.py needs a GPU that torch can use; bench_bitmap.py measures the host")
    run(args, torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name())


def run(args: Namespace, device: torch.device, gpu: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(args.elements, device=device)
    n, k = values.numel(), words_for(values.numel())
    repeat = Repeat(args.repeats, device)
    copying = repeat(COPY, "`torch.Tensor.copy_` of the fp32 gradient", copier(values))
    packing, unpacking = packers(values, repeat), unpackers(values, repeat)
    counting = deciders(DECIDED * n, args.ballots, device, repeat)
    resnet = resnet50(device, repeat)
    averaging = averagers(values, repeat)
    contenders = repeat.those_that_run([copying, *packing, *averaging, *unpacking, *counting, *resnet])
    times = measure(contenders, args.rounds, args.warmup)

    decide, misaligned, _ = names(counting)
    counted = 4 * words_for(DECIDED * n) * (args.ballots + 1)
    moved = {
        COPY: 8 * n,
        PACK: 4 * n + 4 * k,
        "pack, 10 % zeros": 4 * n + 4 * k,
        "pack, 10 % abstain": 4 * n + 8 * k,
        PACK_ROWS: 4 * n + 8 * k,
        PACK_BF16: 2 * n + 4 * k,
        "pack, misaligned": 4 * n + 4 * k,
        PACK_MOMENTUM: 12 * n + 4 * k,
        UNPACK: 4 * n + 4 * k,
        "unpack, two planes": 4 * n + 8 * k,
        decide: counted,
        misaligned: counted,
    }
    size = f"{n:,} x float32"
    tables = [
        bandwidths(times, moved, args.repeats),
        against(f"Pack {size}", times, names(packing), [COPY, "torch pack", "cupy.packbits"]),
        against(f"Momentum and pack {size}", times, names(averaging), [COPY, LERP]),
        against(f"Unpack {size}", times, names(unpacking), [COPY, "torch unpack", "cupy.unpackbits"]),
        against(f"Decide {args.ballots} bitmaps of {DECIDED * n:,} bits", times, names(counting), names(counting)[2:]),
        published(times, n * args.repeats),
        small(times, args.repeats),
    ]
    targets = [
        Target(one, COPY, round(SHARE * moved[COPY] / moved[one], 2))
        for one in (PACK, PACK_ROWS, PACK_BF16, PACK_MOMENTUM, UNPACK, decide)
    ]
    report = Report(
        "bitmap-gpu",
        f"Bit arithmetic on one {gpu}",
        "\n".join([WORDS.format(repeats=args.repeats, decided=DECIDED), *repeat.told_of_failures()]),
        args,
        contenders,
        times,
        targets,
        tables,
        extra={"failed": repeat.failures, "gpu": gpu, "cuda": torch.version.cuda, "bytes_moved_by_a_launch": moved},
    )
    report.show()
    if args.report:
        print("\n".join(f"wrote {path}" for path in report.write(args.results)))


class Repeat:
    """Makes contenders of kernels: many launches and one synchronisation, which then weighs little.

    Attributes:
        failures: by rival, why it does not run here. It is left out.
    """

    def __init__(self, launches: int, device: torch.device) -> None:
        self._launches, self._device = launches, device
        self.failures: dict[str, str] = {}
        self._rivals: set[str] = set()

    def rival(self, name: str, what: str, launch: Callable[[], object]) -> Contender:
        """Somebody else's, which may not compile on this machine."""
        self._rivals.add(name)
        return self(name, what, launch)

    def try_rival(self, name: str, ours: Tensor, theirs: Callable[[], Any]) -> None:
        """Compare a rival's result, if it has one. Raises RuntimeError if it is another than ours."""
        try:
            found = theirs()
        except Exception as error:  # of its compiler, its driver, its memory
            self._leave_out(name, error)
            return
        if not torch.equal(ours, found if isinstance(found, Tensor) else torch.utils.dlpack.from_dlpack(found)):
            raise RuntimeError(f"{name} gives other results than mpisign.bitmap.cuda")

    def those_that_run(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Without the rivals that fail; what is the library's own must run."""
        able = []
        for one in contenders:
            if one.name in self.failures:
                continue
            if one.name in self._rivals:
                try:
                    one.run()
                except Exception as error:
                    self._leave_out(one.name, error)
                    continue
            able.append(one)
        return able

    def told_of_failures(self) -> list[str]:
        return [f"`{name}` does not run on this machine and is left out: {why}." for name, why in self.failures.items()]

    def _leave_out(self, name: str, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.failures[name] = f"{type(error).__name__}: {lines[0]}"[:200]

    def __call__(self, name: str, what: str, launch: Callable[[], object]) -> Contender:
        def run() -> None:
            for _ in range(self._launches):
                launch()
            self.synchronize()

        return Contender(name, what, run, prepare=self.synchronize)

    def alone(self, name: str, what: str, call: Callable[[], object]) -> Contender:
        """Only what the calls take on the host, while the GPU works behind."""

        def run() -> None:
            for _ in range(self._launches):
                call()

        return Contender(name, what, run, prepare=self.synchronize)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def names(contenders: Sequence[Contender]) -> list[str]:
    return [one.name for one in contenders]


def against(title: str, times: Times, contenders: Sequence[str], references: Sequence[str]) -> Table:
    """As harness.compare, of those that run here."""
    return compare(
        title, times, [one for one in contenders if one in times], [one for one in references if one in times]
    )


def on_torch_stream(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """CuPy's own functions, on the stream on which all else runs."""

    def run() -> None:
        with kernels.stream(device):
            call()

    return run


# ------------------------------------------------------------------------------------------- what is timed


def copier(values: Tensor) -> Callable[[], object]:
    target = torch.empty_like(values)
    return lambda: target.copy_(values)


def packers(values: Tensor, repeat: Repeat) -> list[Contender]:
    n, k, device = values.numel(), words_for(values.numel()), values.device
    gaps = values.masked_fill(torch.rand(n, device=device) < 0.1, 0)
    words, nonzero = torch.empty(2, k, dtype=WORD, device=device)
    finite = torch.tensor(True, device=device)
    half, shifted = values.bfloat16(), torch.empty(n + 1, device=device)[1:].copy_(values)

    def packer(source: Tensor, zeros: str = "coin") -> Callable[[], object]:
        plane = nonzero if zeros in ("abstain", "rows") else None
        return lambda: cuda.pack(source, words, zeros=zeros, key=KEY, nonzero=plane, finite=finite)

    whole, powers = values[: n - n % 8], 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    cupy = kernels.import_cupy()
    array = cupy.from_dlpack(values)

    def torch_pack() -> Tensor:
        return ((whole >= 0).view(-1, 8) * powers).sum(1, dtype=torch.uint8)

    def cupy_pack() -> Any:
        return cupy.packbits(array >= 0, bitorder="little")

    packer(values, "positive")()
    expected = words.view(torch.uint8)
    repeat.try_rival("torch pack", expected[: n // 8], torch_pack)
    repeat.try_rival("cupy.packbits", expected[: (n + 7) // 8], cupy_pack)
    return [
        repeat(PACK, "`zeros='coin'`; normal data, almost no zeros", packer(values)),
        repeat("pack, 10 % zeros", "`zeros='coin'`, a tenth of the data exactly 0", packer(gaps)),
        repeat("pack, 10 % abstain", "`zeros='abstain'`, same data, two planes", packer(gaps, "abstain")),
        repeat(PACK_ROWS, "`zeros='rows'`, the library's default: the coin, and two planes", packer(values, "rows")),
        repeat(PACK_BF16, "bfloat16 values", packer(half)),
        repeat("pack, misaligned", "fp32 values that start 4 bytes after aligned memory", packer(shifted)),
        repeat.rival("torch pack", "`((x >= 0).view(-1, 8) * powers_of_two).sum(1)`", torch_pack),
        repeat.rival("cupy.packbits", "`cupy.packbits(x >= 0, bitorder='little')`", on_torch_stream(cupy_pack, device)),
    ]


def averagers(values: Tensor, repeat: Repeat) -> list[Contender]:
    """Signum's packing: the gradient goes into the momentum, whose signs are packed."""
    n, k, device = values.numel(), words_for(values.numel()), values.device
    words, expected = torch.empty(2, k, dtype=WORD, device=device)
    ours, theirs = (torch.zeros_like(values) for _ in range(2))
    batch, finite = Batch([n], [words]), torch.tensor(True, device=device)

    def pack_momentum() -> object:
        return batch.pack_momentum([values], [ours], (0.9, 0.9), key=KEY)

    def lerp_then_pack() -> object:
        return cuda.pack(theirs.lerp_(values, 1.0 - 0.9), expected, key=KEY, finite=finite)

    pack_momentum()
    lerp_then_pack()
    repeat.try_rival(LERP, words, lambda: expected)
    return [
        repeat(
            PACK_MOMENTUM, "a gradient into its fp32 momentum (0.9), and the signs of that, in one pass", pack_momentum
        ),
        repeat(LERP, "the same in two passes: `momentum.lerp_(gradient, 0.1)`, `pack(momentum)`", lerp_then_pack),
    ]


def unpackers(values: Tensor, repeat: Repeat) -> list[Contender]:
    n, k, device = values.numel(), words_for(values.numel()), values.device
    words, nonzero = random_words(2, k, device)
    out = torch.empty_like(values)
    as_bytes, places = words.view(torch.uint8), torch.arange(8, dtype=torch.uint8, device=device)
    cupy = kernels.import_cupy()
    array = cupy.from_dlpack(as_bytes)

    def torch_unpack() -> Tensor:
        bits = (as_bytes[:, None] >> places) & 1
        signs: Tensor = bits.view(-1)[:n].to(values.dtype).mul_(2).sub_(1)
        return signs

    def cupy_unpack() -> Any:
        return cupy.unpackbits(array, bitorder="little")[:n].astype(cupy.float32) * 2 - 1

    cuda.unpack(words, out)
    repeat.try_rival("torch unpack", out, torch_unpack)
    repeat.try_rival("cupy.unpackbits", out, cupy_unpack)
    return [
        repeat(UNPACK, "signs to +-1, into the gradient", lambda: cuda.unpack(words, out)),
        repeat("unpack, two planes", "+-1 or 0, from two bitmaps", lambda: cuda.unpack(words, out, nonzero=nonzero)),
        repeat.rival("torch unpack", "`((bytes[:, None] >> arange(8)) & 1).to(dtype) * 2 - 1`", torch_unpack),
        repeat.rival(
            "cupy.unpackbits",
            "`cupy.unpackbits(bytes, bitorder='little').astype('f4') * 2 - 1`",
            on_torch_stream(cupy_unpack, device),
        ),
    ]


def random_words(rows: int, k: int, device: torch.device, misaligned: bool = False) -> Tensor:
    """(rows, k) random words; rows start at multiples of 16 bytes, or of 4 only, as ballots in a message may."""
    spaced = torch.randint(-(2**31), 2**31, (rows, -(-k // 4) * 4 + misaligned), dtype=WORD, device=device)
    return spaced[:, :k]


def deciders(n: int, ballots: int, device: torch.device, repeat: Repeat) -> list[Contender]:
    k = words_for(n)
    out, tied = torch.empty(k, dtype=WORD, device=device), torch.tensor(0, device=device)
    votes = torch.randint(0, 2, (ballots, n), dtype=torch.int8, device=device).mul_(2).sub_(1)

    def majority(misaligned: bool) -> Callable[[], object]:
        bitmaps = list(random_words(ballots, k, device, misaligned))
        return lambda: cuda.majority(bitmaps, out, ties="coin", key=KEY, tied=tied)

    return [
        repeat(f"majority of {ballots}", "bit-sliced counters on whole words, `ties='coin'`", majority(False)),
        repeat(
            f"majority of {ballots}, misaligned", "the same of bitmaps that start at any multiple of 4", majority(True)
        ),
        repeat.rival(
            f"torch int8 sum of {ballots}",
            "one int8 for each vote: `votes.sum(0, dtype=torch.int8) > 0`",
            lambda: votes.sum(0, dtype=torch.int8) > 0,
        ),
    ]


def resnet50(device: torch.device, repeat: Repeat) -> list[Contender]:
    gradients: list[Tensor | None] = [torch.randn(shape, device=device) for shape in resnet50_shapes()]
    sizes = [prod(shape) for shape in resnet50_shapes()]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + words_for(size))
    words = torch.zeros(starts[-1], dtype=WORD, device=device)
    places = [words[start : start + words_for(size)] for start, size in zip(starts, sizes, strict=False)]
    batch = Batch(sizes, places, first_words=starts[:-1])

    def pack() -> object:
        return batch.pack(gradients, key=KEY)

    def unpack() -> None:
        batch.unpack(gradients)

    return [
        repeat(RESNET_PACK, "161 gradients, 25.6 M fp32 elements, one launch", pack),
        repeat(RESNET_UNPACK, "the same back", unpack),
        repeat.alone(RESNET_PACK_CALL, "what the host spends on it", pack),
        repeat.alone(RESNET_UNPACK_CALL, "what the host spends on it", unpack),
    ]


# ----------------------------------------------------------------------------------------------- what is shown


def bandwidths(times: Times, moved: dict[str, int], repeats: int) -> Table:
    rows = []
    for name, size in moved.items():
        rates = [repeats * size / seconds / 1e9 for seconds in times[name]]
        copies = [repeats * moved[COPY] / seconds / 1e9 for seconds in times[COPY]]
        shares = [rate / copy for rate, copy in zip(rates, copies, strict=True)]
        shown = [f"{statistics.median(rates):,.0f}", f"{max(rates):,.0f}", f"{statistics.median(shares):.2f}"]
        rows.append([name, f"{size / 1e6:,.0f}", *shown])
    columns = ["", "MB a launch", "median GB/s", "fastest GB/s", "share of copy"]
    return Table("Bandwidth, by bytes that must be moved", columns, rows)


def published(times: Times, elements: int) -> Table:
    ours = [(pack + unpack) / elements for pack, unpack in zip(times[PACK], times[UNPACK], strict=True)]
    mine = statistics.median(ours)
    rows = [
        ["signSGD paper's code, V100, as published", f"{PUBLISHED * 1e12:,.0f}", "1"],
        ["pack + unpack, this GPU", f"{mine * 1e12:,.2f}", f"{PUBLISHED / mine:,.0f}"],
    ]
    return Table("Encode and decode", ["", "us per million floats", "times faster"], rows)


def small(times: Times, repeats: int) -> Table:
    rows = []
    for name in (RESNET_PACK, RESNET_UNPACK, RESNET_PACK_CALL, RESNET_UNPACK_CALL):
        each = [1e6 * seconds / repeats for seconds in times[name]]
        rows.append([name, f"{statistics.median(each):.0f}", f"{min(each):.0f}"])
    return Table("ResNet-50's 161 tensors", ["", "median us a launch", "fastest"], rows)


if __name__ == "__main__":
    main()
