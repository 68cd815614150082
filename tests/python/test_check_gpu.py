"""tools/check_gpu.sh without a GPU: what it says where something is missing, and its report of
programs that stand in for the driver, the compiler, the tests and the benchmark."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tools/check_gpu.sh"
TOOLS = [
    "bash",
    "dirname",
    "head",
    "tail",
    "sed",
    "sort",
    "mkdir",
    "git",
    "env",
    "cp",
    "chmod",
    "cat",
]

PASSED = """[==========] 3 tests from 1 test suite ran. (10 ms total)
[  PASSED  ] 2 tests.
[  SKIPPED ] 1 test, listed below:
[  SKIPPED ] Rows.Many
"""
FAILED = """[  FAILED  ] Shapes/Decode.Matches/tiny, where GetParam() = tiny (12 ms)
[       OK ] Decode.Other (3 ms)
[  PASSED  ] 1 test.
[  FAILED  ] 1 test, listed below:
[  FAILED  ] Shapes/Decode.Matches/tiny, where GetParam() = tiny
"""
TIMES = "pythia-2.8b  context   128: 3.1000 ms a token (3.0 to 3.2), 78.0 % of 0.900 TB/s"


class Machine:
    """Programs in a folder that is all of PATH."""

    def __init__(self, folder: Path):
        self.programs = folder / "programs"
        self.build = folder / "build"
        self.programs.mkdir()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(shutil.which(tool))

    def add(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def add_gpu(self, name: str, capability: str, memory: int = 24000) -> None:
        answers = {
            "name": name,
            "compute_cap": capability,
            "driver_version": "580.1",
            "memory.total": f"{memory} MiB",
        }
        cases = " ".join(f'*={field}" "*) echo "{answer}";;' for field, answer in answers.items())
        self.add("nvidia-smi", f'case "$* " in {cases} esac')

    def add_builder(self, tests: str, status: int = 0, times: str = TIMES, bench: int = 0) -> None:
        """nvcc, and a cmake that writes its arguments and makes the programs."""
        self.add("nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
        for name, text, code, channel in (
            ("gpu_test", tests, status, 1),
            ("decode_time", times, bench, 2),
        ):
            self.add(f"made_{name}", f"cat >&{channel} <<'END'\n{text}\nEND\nexit {code}")
        self.add(
            "cmake",
            f'echo "$*" >>{self.build}/arguments; mkdir -p {self.build}/bin; '
            f"for program in gpu_test decode_time; do "
            f"cp {self.programs}/made_$program {self.build}/bin/$program; done",
        )

    def check(self, **more: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.programs), "HOME": os.environ.get("HOME", "/")} | more
        return subprocess.run(
            [SCRIPT, self.build], env=environment, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_no_driver(machine):
    result = machine.check()
    assert result.returncode == 2
    assert "nvidia-smi is not on PATH: there is no NVIDIA driver" in result.stderr


def test_no_gpu(machine):
    machine.add("nvidia-smi", "echo 'No devices were found'; exit 6")
    result = machine.check()
    assert result.returncode == 2
    assert 'finds no GPU "0"; it says: No devices were found' in result.stderr


def test_old_gpu(machine):
    machine.add_gpu("Tesla T4", "7.5")
    result = machine.check()
    assert result.returncode == 2
    assert "Tesla T4 has compute capability 7.5; the kernels need 8.0" in result.stderr


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="a CUDA compiler is here")
def test_no_compiler(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    result = machine.check()
    assert result.returncode == 2
    assert "no CUDA compiler: nvcc is neither on PATH" in result.stderr


def test_another_compiler_that_is_not_there(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder(PASSED)
    result = machine.check(CUDACXX="/no/nvcc")
    assert result.returncode == 2
    assert 'CUDACXX is "/no/nvcc", and there is no such program' in result.stderr


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [("8.0", "80"), ("8.6", "80"), ("8.9", "80"), ("9.0", "90a"), ("10.0", "100"), ("12.1", "120")],
)
def test_reports_what_passed(machine, capability, architecture):
    machine.add_gpu("NVIDIA A10", capability)
    machine.add_builder(PASSED)
    result = machine.check()
    assert result.returncode == 0, result.stderr
    assert (
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"
        in (machine.build / "arguments").read_text()
    )
    report = result.stdout
    assert "| card | NVIDIA A10, 24000 MiB |" in report
    assert f"| compute capability | {capability}, code for {architecture}-real |" in report
    assert "| driver, CUDA | 580.1, 13.0 |" in report
    assert "| GPU tests | 2 passed, 0 failed, 1 skipped, in " in report
    assert "| decode | pythia-2.8b context 128: 3.1000 ms a token (3.0 to 3.2), 78.0 % of" in report


def test_reports_what_failed(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder(FAILED, status=1)
    result = machine.check()
    assert result.returncode == 1
    assert "| GPU tests | 1 passed, 1 failed, 0 skipped, in " in result.stdout
    assert result.stdout.count("| failed | Shapes/Decode.Matches/tiny |") == 1
    assert "Decode.Other" not in result.stdout


def test_reports_a_crash(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder("[ RUN      ] Shapes/Decode.Matches/tiny", status=139)
    result = machine.check()
    assert result.returncode == 1
    assert "ended with status 139 before the last test: [ RUN      ] Shapes/Decode" in result.stdout


def test_all_skipped_is_no_success(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder("[  PASSED  ] 0 tests.\n[  SKIPPED ] 3 tests, listed below:")
    result = machine.check()
    assert result.returncode == 1
    assert "| GPU tests | none ran; 0 passed, 0 failed, 3 skipped" in result.stdout


def test_reports_a_failed_benchmark(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder(PASSED, times="decode_time: out of memory", bench=1)
    result = machine.check()
    assert result.returncode == 1
    assert "| decode | failed: decode_time: out of memory |" in result.stdout


def test_failed_build_says_where_to_look(machine):
    machine.add_gpu("NVIDIA A10", "8.6")
    machine.add_builder(PASSED)
    machine.add("cmake", "echo 'CMake Error: no Ninja'; exit 1")
    result = machine.check()
    assert result.returncode == 2
    assert "CMake Error: no Ninja" in result.stderr
    assert "logs/configure.log" in result.stderr


def test_small_memory_takes_a_small_model(machine):
    machine.add_gpu("NVIDIA RTX A2000", "8.6", memory=6000)
    machine.add_builder(PASSED)
    machine.add("made_decode_time", 'echo "$1 context 128" >&2')
    result = machine.check()
    assert result.returncode == 0, result.stderr
    assert "| decode | pythia-410m context 128 |" in result.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_has_nothing_to_say():
    result = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
