"""mpisign.bitmap.native: how the C library is built, found and chosen. What it computes is in bitmap_contract."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpirun import environment

from mpisign import backends
from mpisign.bitmap import native

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("gcc") or shutil.which("cc")
ELEMENTS = 9 * native.PIECE + 77  # more pieces than one thread takes

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled library: {native.absence()}")


def python(program: str, **variables: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def compile_to(library: Path, *options: str) -> None:
    """As setup.py does, which names the options."""
    given = re.findall(r'"(-[^"]+)"', (ROOT / "setup.py").read_text())
    macros = ["-D_GNU_SOURCE", f"-DSOURCES={native.checksum()}u"]
    command = [str(COMPILER), *given, *macros, *options, "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(native.SOURCES[0]), "-lm"], check=True, timeout=120)


@needs_compiler
def test_where_there_is_a_compiler_it_is_installed() -> None:
    assert native.library() is not None, native.absence()
    assert backends.backend_for(torch.device("cpu")).name == "native"


NAME = "import torch, mpisign.backends as b; print(b.backend_for(torch.device('cpu')).name)"
WHY = "from mpisign.bitmap import native; print(native.absence())"


@pytest.mark.long
def test_a_variable_leaves_it_alone() -> None:
    assert python(NAME, MPISIGN_NATIVE="0") == "host"
    assert python(WHY, MPISIGN_NATIVE="0") == "MPISIGN_NATIVE is 0"


def patched(library: Path, program: str) -> str:
    find = f"import pathlib; from mpisign.bitmap import native; native.LIBRARY = pathlib.Path({str(library)!r})"
    return python(f"{find}\n{program}")


@pytest.mark.long
def test_without_it_numpy_serves(tmp_path: Path) -> None:
    assert patched(tmp_path / "none.so", NAME) == "host"
    assert "not compiled when mpisign was installed" in patched(tmp_path / "none.so", WHY)
    (tmp_path / "no.so").write_bytes(b"no library")
    assert patched(tmp_path / "no.so", NAME) == "host"
    assert "it cannot be loaded" in patched(tmp_path / "no.so", WHY)


@pytest.mark.long
@needs_compiler
def test_one_of_other_sources_is_not_called(tmp_path: Path) -> None:
    library = tmp_path / "other.so"
    compile_to(library, "-O0", "-USOURCES", "-DSOURCES=7u")
    assert patched(library, NAME) == "host"
    assert "other sources" in patched(library, WHY)


@needs_library
def test_processors_of_all_generations_have_loops() -> None:
    names = [native.choose(most) for most in range(4)]
    assert native.choose() == names[-1] == names[2]
    assert set(names) <= {"x86-64", "AVX2", "AVX-512", "baseline"}


def test_it_is_optional(tmp_path: Path) -> None:
    """With a compiler that fails, setup.py goes on."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "mpisign", tmp_path / "mpisign", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = environment({"CC": "false"})
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "libmpisign" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_library
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_change_no_bit(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ELEMENTS, generator=generator)
    values[::7] = 0
    values[5 * native.PIECE :].mul_(-1)
    backend = backends.backend_for(torch.device("cpu"))
    before = torch.get_num_threads()
    found: list[list[torch.Tensor]] = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            k = -(-ELEMENTS // 32)
            words, spoken, decided = (torch.zeros(k, dtype=backends.WORD) for _ in range(3))
            averages, out = torch.ones(ELEMENTS), torch.empty(ELEMENTS)
            bitmaps = backend.bitmaps([ELEMENTS], [words], [spoken], [3])
            assert bitmaps.pack_average([values], [averages], (0.9, 0.99), unscale=0.5, zeros="rows", key=7) == 1
            ties = backend.majority([words, spoken], decided, key=5)
            backend.unpack(decided, out)
            found.append([words, spoken, averages, decided, out, torch.tensor(ties)])
            bad = values.clone()
            bad[-1] = float("nan")
            assert not backend.pack(bad, words)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_tensors_of_other_sizes_are_refused() -> None:
    backend = backends.backend_for(torch.device("cpu"))
    words = torch.zeros(2, dtype=backends.WORD)
    for sizes in ([32], [65], [64, 64]):
        with pytest.raises(ValueError):
            backend.bitmaps([64], [words], [None], [0]).unpack([torch.zeros(size) for size in sizes])


@needs_library
def test_bitmaps_that_are_none_are_refused() -> None:
    """Where NumPy would raise, or copy, C would write beside them."""
    backend = backends.backend_for(torch.device("cpu"))
    good, values = torch.zeros(2, dtype=backends.WORD), torch.ones(64)
    planes = torch.zeros((2, 4), dtype=backends.WORD)
    for wrong in (torch.zeros(1, dtype=backends.WORD), torch.zeros(2), torch.zeros(4, dtype=backends.WORD)[::2]):
        for call in (
            lambda wrong: backend.pack(values, wrong),
            lambda wrong: backend.pack(values, good, zeros="rows", nonzero=wrong),
            lambda wrong: backend.unpack(wrong, values),
            lambda wrong: backend.bitmaps([64], [good], [None], [0]).apply([values], [1.0], [0.0], [wrong]),
            lambda wrong: backend.majority([good, wrong], good),
            lambda wrong: backend.majority([good], good, nonzeros=[good], out_nonzero=wrong),
            lambda wrong: backend.count([wrong], planes[:, :2]),
            lambda wrong: backend.count([good], planes[:, ::2]),
            lambda wrong: backend.decide_counts(planes[:, :2], 2, good, out_nonzero=wrong),
        ):
            with pytest.raises(ValueError, match="contiguous 32-bit words"):
                call(wrong)


SANITIZED = """
import pathlib, sys
sys.path.insert(0, sys.argv[2] + "/bitmap_contract")
from mpisign.bitmap import native
native.LIBRARY = pathlib.Path(sys.argv[1])
import contract, pytest
contract.GUARD = 0  # so that memory ends where a tensor does
tests = "native and not avx2 and not test_decide_counts and not test_add_counts"
tests += " or native and (1-coin or 1-0-1)"
sys.exit(pytest.main(["-q", "-s", "-x", "-p", "no:cacheprovider", sys.argv[2] + "/bitmap_contract", "-k", tests]))
"""


@pytest.mark.long
@needs_compiler
def test_no_byte_beside_its_memory_is_touched(tmp_path: Path) -> None:
    library = tmp_path / "sanitized.so"
    compile_to(library, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    runtime = [
        subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    variables = environment({
        "LD_PRELOAD": ":".join(done.stdout.strip() for done in runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    })  # fmt: skip
    command = [sys.executable, "-c", SANITIZED, str(library), str(ROOT / "tests")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(".") > 100
