"""Every CUDA file compiles for the kinds of GPU that continuous integration builds nothing for, and
some kernels' registers: compute capability 8.0 (runs on 8.6 and 8.9) and 10.0.

Instruction by instruction ptxas refuses there what such a chip does not have.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

CUDA = ROOT / "src" / "backend" / "cuda"
# The smallest instance of each template.
SMALLEST = {
    "element": "__half",
    "dtype": "tested",
    "iterations": 5,
    "head_steps": 5,
    "operand_rows": 8,
    "pieces": 2,
}
TEMPLATES = [
    (path, kind)
    for path in sorted(CUDA.rglob("*.cu.in"))
    for kind in (["plain", "any"] if "@kind@" in path.read_text() else [""])
]
# Bytes that a kernel of these may store and load again; all others none.
SPILLS = {
    # gemm_attention is launched on 9.0 alone.
    "80": {"decode_plain": 456, "decode_any": 384, "gemm_attention": 8},
    "100": {"prefill_attention": 16, "ops_plain_layer": 44},
}


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        pytest.skip("there is no CUDA compiler (nvcc)")
    return [*filter(None, [shutil.which("ccache")]), compiler]


def spilled_bytes(nvcc: list[str], source: Path, arch: str) -> list[int]:
    """What each kernel of a file stores and loads again."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    includes = ["-I", str(ROOT / "include"), "-I", str(ROOT / "src")]
    done = subprocess.run(
        # -cubin leaves out the host's code; ccache takes it for a compilation only beside -c.
        [*nvcc, *flags, *target, *includes, "-c", "-cubin", source.name, "-o", "kernels.cubin"],
        cwd=source.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return [sum(map(int, kernel)) for kernel in report]


def instance_of(template: Path, values: dict[str, object]) -> str:
    source = template.read_text()
    for name, value in values.items():
        source = source.replace(f"@{name}@", str(value))
    return source


def name_of(template: tuple[Path, str]) -> str:
    path, kind = template
    name = path.name.removesuffix("_instance.cu.in")
    return f"{name}_{kind}" if kind else f"{path.parent.name}_{name}"


@pytest.mark.parametrize("arch", SPILLS)
@pytest.mark.parametrize("template", TEMPLATES, ids=name_of)
def test_instances(nvcc, tmp_path, template, arch):
    path, kind = template
    (tmp_path / "instance.cu").write_text(instance_of(path, SMALLEST | {"kind": kind}))
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled
    assert max(spilled) <= SPILLS[arch].get(name_of(template), 0)


def name_of_file(path: Path) -> str:
    return f"{path.parent.name}_{path.stem}"


@pytest.mark.parametrize("arch", SPILLS)
@pytest.mark.parametrize("source", sorted(CUDA.rglob("*.cu")), ids=name_of_file)
def test_files(nvcc, tmp_path, source, arch):
    (tmp_path / "file.cu").write_text(f'#include "{source.relative_to(ROOT / "src")}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "file.cu", arch)
    assert spilled
    assert max(spilled) <= SPILLS[arch].get(name_of_file(source), 0)
