"""What the compiler says that the streaming kernels need: every instance, for both architectures.

A spilled register costs a trip to L2 behind the weights, so the instances that matter most spill
nothing, and none may begin to spill more than it does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "src" / "backend" / "cuda"
TEMPLATES = {
    "decode": CUDA / "decode" / "decode_instance.cu.in",
    "layer": CUDA / "ops" / "layer_instance.cu.in",
}
# As src/backend/cuda/CMakeLists.txt makes them.
ITERATIONS, HEAD_STEPS = (5, 10), (5, 8, 16)
# Bytes that an instance may store and load again, by its iterations and head steps. On sm_120,
# ptxas ignores setmaxnreg, so there are fewer registers.
DECODE_SPILLS = {
    "90a": {(5, 5): 0, (5, 8): 0, (5, 16): 0, (10, 5): 0, (10, 8): 0, (10, 16): 500},
    "120a": {(5, 5): 0, (5, 8): 232, (5, 16): 592, (10, 5): 636, (10, 8): 788, (10, 16): 1264},
}
LAYER_SPILLS = {"90a": {}, "120a": {(5, 16): 32, (10, 16): 24}}  # others none
INSTANCES = [(i, h, "__half") for i in ITERATIONS for h in HEAD_STEPS] + [(5, 5, "__nv_bfloat16")]


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        pytest.skip("there is no CUDA compiler (nvcc)")
    return [*filter(None, [shutil.which("ccache")]), compiler]


@pytest.mark.parametrize("arch", DECODE_SPILLS)
@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: "-".join(map(str, i)))
@pytest.mark.parametrize("kernel", TEMPLATES)
def test_spills_no_more_than_it_may(nvcc, tmp_path, kernel, instance, arch):
    iterations, head_steps, element = instance
    source = TEMPLATES[kernel].read_text()
    for name, value in {
        "element": element,
        "dtype": "tested",
        "iterations": iterations,
        "head_steps": head_steps,
    }.items():
        source = source.replace(f"@{name}@", str(value))
    (tmp_path / "instance.cu").write_text(source)
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    includes = ["-I", str(ROOT / "include"), "-I", str(ROOT / "src")]
    done = subprocess.run(
        [*nvcc, *flags, *target, *includes, "-c", "instance.cu", "-o", "instance.o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(report) == 1, f"expected a report of one kernel, found {done.stderr}"
    allowed = DECODE_SPILLS if kernel == "decode" else LAYER_SPILLS
    assert sum(map(int, report[0])) <= allowed[arch].get((iterations, head_steps), 0)
