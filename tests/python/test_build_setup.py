"""What building says where something is missing: CMake and tools/install_dependencies.sh."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

INSTALL = ROOT / "tools/install_dependencies.sh"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "c++"))), reason="no build tools"
)


def configure(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """The exit status of CMake for the program alone, and all that it said, in one line."""
    result = subprocess.run(
        ["cmake", "--preset", "program", "-S", ROOT, "-B", folder, *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.returncode, re.sub(r"\s+", " ", result.stdout + result.stderr)


@pytest.fixture
def old_nvcc(tmp_path) -> str:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_old_cuda_is_left_out(tmp_path, old_nvcc):
    status, said = configure(tmp_path / "build", CUDACXX=old_nvcc)
    assert status == 0, said
    assert f"CUDA: off, since {old_nvcc} is of CUDA 12.4, and the code needs 13.0" in said


def test_old_cuda_is_an_error_where_cuda_is_asked_for(tmp_path, old_nvcc):
    status, said = configure(tmp_path / "build", "-DCLUSTERFUSION_CUDA=ON", CUDACXX=old_nvcc)
    assert status != 0
    assert f"CLUSTERFUSION_CUDA is ON, but {old_nvcc} is of CUDA 12.4" in said


def test_all_that_is_missing_is_named_at_once(tmp_path):
    missing = ("fmt", "simdjson", "utf8proc", "pcre2", "CLI11")
    status, said = configure(
        tmp_path / "build", *(f"-DCMAKE_DISABLE_FIND_PACKAGE_{package}=ON" for package in missing)
    )
    assert status != 0
    assert said.count("CMake Error") == 1
    for package in missing:
        assert f" {package}, https://".lower() in said.lower()
    assert "Highway" not in said
    assert "tools/install_dependencies.sh build" in said


def test_no_compiler_is_named_with_the_rest(tmp_path):
    status, said = configure(
        tmp_path / "build", "-DCMAKE_CXX_COMPILER=no-such-compiler", "-DCLUSTERFUSION_CUDA=OFF"
    )
    assert status != 0
    assert "a C++20 compiler" in said
    assert "https://" not in said, "a library is found without a compiler as well"


def install_without_apt(folder: Path, programs: list[str]) -> subprocess.CompletedProcess:
    """tools/install_dependencies.sh build on a system with these programs and no packages."""
    for program in ["bash", "dirname", "id", *programs]:
        (folder / program).symlink_to(shutil.which(program))
    environment = {"PATH": str(folder)}
    return subprocess.run([INSTALL, "build"], env=environment, capture_output=True, text=True)


def test_without_apt_what_is_there_is_taken(tmp_path):
    result = install_without_apt(tmp_path, ["cmake", "ninja"])
    assert result.returncode == 0, result.stderr
    assert "this system has no apt-get, so nothing is installed" in result.stderr


def test_without_apt_programs_that_are_not_there_are_named(tmp_path):
    result = install_without_apt(tmp_path, ["cmake"])
    assert result.returncode == 1
    assert "not on PATH, and needed: ninja\n" in result.stderr


@pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")),
    reason="there is no CUDA compiler (nvcc)",
)
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        # Without its "a" Hopper's instructions are not there.
        (["-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real"], 'cannot be compiled for "90-real"'),
        (["-DCMAKE_CUDA_ARCHITECTURES=75"], 'cannot be compiled for "75"'),
        (["-DCMAKE_CUDA_ARCHITECTURES=80-virtual"], "It may hold 80-real (runs on 8.0, 8.6 and"),
        (["-DCLUSTERFUSION_CUDA_COPY=tma"], 'CLUSTERFUSION_CUDA_COPY is "tma"; expected'),
        (
            ["-DCLUSTERFUSION_CUDA_COPY=bulk", "-DCMAKE_CUDA_ARCHITECTURES=90a-real;80-real"],
            "only 9.0 and later have bulk copies",
        ),
    ],
)
def test_what_kernels_cannot_be_compiled_for(tmp_path, options, complaint):
    status, said = configure(tmp_path / "build", "-DCLUSTERFUSION_CUDA=ON", *options)
    assert status != 0
    assert complaint in said
