"""Every CUDA file compiles for the kinds of GPU that continuous integration builds nothing for, and
some kernels' registers: compute capability 8.0 (runs on 8.6 and 8.9) and 10.0.

Instruction by instruction ptxas refuses there what such a chip does not have.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kernel_resources import CUDA, ROOT, instance_of, nvcc, spilled_bytes  # noqa: F401

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
    "80": {"decode_plain": 420, "decode_any": 946, "gemm_attention": 8},
    "100": {"decode_plain": 60, "decode_any": 64, "prefill_attention": 16, "ops_plain_layer": 44},
}


def name_of(template: tuple[Path, str]) -> str:
    path, kind = template
    name = path.name.removesuffix("_instance.cu.in")
    return f"{name}_{kind}" if kind else f"{path.parent.name}_{name}"


@pytest.mark.parametrize("arch", SPILLS)
@pytest.mark.parametrize("template", TEMPLATES, ids=name_of)
def test_instances(nvcc, tmp_path, template, arch):  # noqa: F811
    path, kind = template
    (tmp_path / "instance.cu").write_text(instance_of(path, SMALLEST | {"kind": kind}))
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled
    assert max(spilled) <= SPILLS[arch].get(name_of(template), 0)


def name_of_file(path: Path) -> str:
    return f"{path.parent.name}_{path.stem}"


@pytest.mark.parametrize("arch", SPILLS)
@pytest.mark.parametrize("source", sorted(CUDA.rglob("*.cu")), ids=name_of_file)
def test_files(nvcc, tmp_path, source, arch):  # noqa: F811
    (tmp_path / "file.cu").write_text(f'#include "{source.relative_to(ROOT / "src")}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "file.cu", arch)
    assert spilled
    assert max(spilled) <= SPILLS[arch].get(name_of_file(source), 0)
