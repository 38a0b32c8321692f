"""What is installed, and what the build says when it cannot go on. Builds run in a copy of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import specexit_kernels

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
BUNDLED = {".json", ".jsonl", ".md", ".safetensors"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that a build leaves nothing here."""
    copy = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "tests")
    return shutil.copytree(ROOT, copy, ignore=unwanted)


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDAARCHS", "CMAKE_ARGS")}
    done = subprocess.run(
        command, cwd=folder, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)  # pytest shows it when the test fails
    return done


def wheel(tree: Path, **environment: str) -> zipfile.ZipFile:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        tree / "out",
        ".",
    ]
    assert run(command, tree, **environment).returncode == 0
    (path,) = (tree / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def sources(tree: Path) -> set[str]:
    """Every file that an installation has, by its path there."""
    files = set()
    for folder, parent in ((tree / "specexit_kernels", tree), (tree / "python" / "specexit", tree / "python")):
        for path in folder.rglob("*"):
            if path.suffix == ".py" or path.name == "py.typed" or ("bundled" in path.parts and path.suffix in BUNDLED):
                files.add(path.relative_to(parent).as_posix())
    return files


def test_wheel_without_cuda_has_every_source_and_nothing_else(tree):
    archive = wheel(tree, SPECEXIT_CUDA="0")
    assert archive.filename.endswith("-py3-none-any.whl")
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources(tree)
    assert {"specexit_kernels/py.typed", "specexit/py.typed"} <= names
    assert any(name.startswith("specexit/bundled/") and name.endswith(".safetensors") for name in names)

    information = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in information
    assert "specexit = specexit.cli:main" in archive.read(information["entry_points.txt"]).decode()
    metadata = HeaderParser().parsestr(archive.read(information["METADATA"]).decode())
    assert metadata["Name"] == "specexit-kernels"
    assert metadata["Version"] == specexit_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SPECEXIT_CUDA", "yes", "SPECEXIT_CUDA must be 0, 1 or unset, was 'yes'"),
        ("CUDACXX", "/nowhere/nvcc", "CUDACXX must be an executable nvcc, was '/nowhere/nvcc'"),
    ],
)
def test_names_a_wrong_environment_variable(tree, name, value, message):
    done = run([sys.executable, "setup.py", "--version"], tree, **{name: value})
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="CMake needs a C++ compiler")
def test_names_the_architecture_that_nvcc_cannot_compile_for(tree):
    nvcc = tree / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    done = run([sys.executable, "setup.py", "build_ext"], tree, CUDACXX=str(nvcc))
    said = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert "cannot compile for 100-real; it knows compute_80, compute_90." in said
    assert "SPECEXIT_CUDA=0" in said


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_wheel_with_cuda_has_the_native_module(tree):
    archive = wheel(tree, SPECEXIT_CUDA="1", CUDAARCHS="80-real")
    assert not archive.filename.endswith("-any.whl")
    (module,) = {name for name in archive.namelist() if ".dist-info/" not in name} - sources(tree)
    assert module.startswith("specexit_kernels/_C.")
    archive.extract(module, tree / "site")
    program = "import _C; print(_C.version, _C.architectures)"
    done = run([sys.executable, "-c", program], tree / "site" / "specexit_kernels")
    assert done.stdout.split() == [specexit_kernels.__version__, "80-real"]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_code_that_does_not_compile_fails_the_build_with_the_log(tree):
    with (tree / "csrc" / "device.cu").open("a") as source:
        source.write("#error this line is wrong\n")
    done = run([sys.executable, "setup.py", "build_ext"], tree, SPECEXIT_CUDA="1", CUDAARCHS="80-real")
    assert done.returncode != 0
    assert "this line is wrong" in done.stdout
    assert "the CUDA module did not build" in done.stdout
