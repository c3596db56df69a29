# Copyright Spack Project Developers. See COPYRIGHT file for details.
#
# SPDX-License-Identifier: (Apache-2.0 OR MIT)

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PyMpisign(PythonPackage):
    """Distributed training by majority vote: one bit a coordinate over MPI, around your own torch optimizer."""

    homepage = "https://mpisign.example/mpisign"
    pypi = "mpisign/mpisign-0.2.0.tar.gz"
    git = "https://mpisign.example/mpisign.git"

    license("Apache-2.0")

    version("main", branch="main")
    # Published versions: `spack checksum py-mpisign` adds them.

    variant("cuda", default=False, description="Votes from the memory of NVIDIA's GPUs")

    depends_on("c", type="build")
    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-numpy@2.0:", type=("build", "run"))
    depends_on("py-torch@2.4:", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("mpi", type="run")
    depends_on("py-cupy@14:", type=("build", "run"), when="+cuda")
    depends_on("py-torch+cuda", type=("build", "run"), when="+cuda")

    import_modules = ["mpisign", "mpisign.checkpoint", "mpisign.bitmap"]

    @run_after("install")
    @on_package_attributes(run_tests=True)
    def check_doctor(self):
        """Versions, MPI, and a real vote of one rank."""
        with working_dir(self.prefix):
            python("-m", "mpisign", "doctor")
