"""The native module's build step; everything else about the package is in pyproject.toml.

Where nvcc is found, CMake builds `specexit_kernels._C` and a failure is an error. Where it is not, the package
installs without the module, and every op runs on Triton or PyTorch. Environment:

    SPECEXIT_CUDA   0: do not build the module; 1: fail where there is no nvcc; not set: build it where nvcc is found
                    (a module that was built in this folder before stays in an editable installation: `make clean`)
    CUDACXX         the nvcc to use; otherwise $CUDA_HOME/bin, PATH and /usr/local/cuda/bin are searched
    CUDAARCHS       architectures as CMake names them, "80-real;90a-real"; the default is in CMakeLists.txt
    CMAKE_ARGS      more arguments for CMake
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc, or None: not there, or not wanted."""
    wish = os.environ.get("SPECEXIT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"SPECEXIT_CUDA must be 0, 1 or unset, was {wish!r}")
    if wish == "0":
        print("specexit-kernels: SPECEXIT_CUDA=0: installing without the CUDA module")
        return None
    if asked := os.environ.get("CUDACXX"):
        nvcc = shutil.which(asked)
        if nvcc is None:
            raise SetupError(f"CUDACXX must be an executable nvcc, was {asked!r}")
        return nvcc
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and wish == "1":
        raise SetupError("SPECEXIT_CUDA=1, but there is no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    if nvcc is None:
        print("specexit-kernels: nvcc not found: installing without the CUDA module")
    return nvcc


def tool(name: str) -> str:
    """Path of a build tool: on PATH, or beside the Python that builds (a virtual environment that is not activated)."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SetupError(f"{name} not found: pip install {name} (or build without --no-build-isolation)")
    return path


class BuildNative(build_ext):
    """Builds each extension with CMake, and keeps the object files in build/ so that a second build is short."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile and install the module where setuptools expects it."""
        import pybind11  # a build dependency: not there when the module is not built

        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = [
            *(tool("cmake"), "--fresh", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_CUDA_COMPILER={NVCC}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPECEXIT_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for command in (
            configure,
            [tool("cmake"), "--build", str(folder)],
            [tool("cmake"), "--install", str(folder), "--prefix", str(target)],
        ):
            print(shlex.join(command), flush=True)
            if subprocess.run(command, check=False).returncode:
                raise CompileError(
                    "the CUDA module did not build: the log is above. To install without it, so that ops run on Triton "
                    "and PyTorch, set SPECEXIT_CUDA=0"
                )


NVCC = find_nvcc()

setup(
    ext_modules=[Extension("specexit_kernels._C", sources=[])] if NVCC else [],
    cmdclass={"build_ext": BuildNative},
)
