"""What the compiler says that the streaming kernels need: every instance, for both architectures;
and the plain layer kernels.

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
    "paged_layer": CUDA / "ops" / "paged_layer_instance.cu.in",
}
# As src/backend/cuda/CMakeLists.txt makes them.
ITERATIONS, HEAD_STEPS = (5, 10), (5, 8, 16)
# Bytes that an instance may store and load again, by its iterations and head steps. On sm_120,
# ptxas ignores setmaxnreg, so there are fewer registers.
DECODE_SPILLS = {
    "90a": {(5, 5): 0, (5, 8): 0, (5, 16): 0, (10, 5): 0, (10, 8): 0, (10, 16): 500},
    "120a": {(5, 5): 0, (5, 8): 232, (5, 16): 596, (10, 5): 636, (10, 8): 788, (10, 16): 1272},
}
LAYER_SPILLS = {"90a": {}, "120a": {(5, 16): 48, (10, 16): 40}}  # others none
# Of the decode kernel for layers of any kind: by iterations, head steps and type.
ANY_LAYER_SPILLS = {
    "90a": {
        (5, 5, "__half"): 36,
        (5, 8, "__nv_bfloat16"): 24,
        (8, 8, "__nv_bfloat16"): 36,
        (10, 8, "__nv_bfloat16"): 36,
        (10, 16, "__half"): 508,
    },
    "120a": {(5, 8, "__nv_bfloat16"): 124},
}
# Of the kernel for many rows, by its operand rows, pieces and head steps; for sm_90a alone.
ROWS_TEMPLATE = CUDA / "stream" / "stream_instance.cu.in"
ROWS_SPILLS = {
    (8, 2, 5): 24,
    (8, 2, 8): 124,
    (8, 2, 16): 296,
    (16, 2, 5): 264,
    (16, 2, 8): 636,
    (16, 2, 16): 1160,
    (8, 4, 8): 892,
    (8, 4, 16): 1464,
    (16, 4, 8): 1892,
    (16, 4, 16): 2348,
}
# Of the series of kernels for more rows: attention's by head steps; nothing else spills.
GEMM = CUDA / "gemm"
GEMM_ATTENTION_SPILLS = {5: 0, 8: 92, 16: 124}
PLAIN_LAYER = CUDA / "ops" / "plain_layer.cu"
INSTANCES = [(i, h, "__half") for i in ITERATIONS for h in HEAD_STEPS] + [(5, 5, "__nv_bfloat16")]


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


@pytest.mark.parametrize("arch", DECODE_SPILLS)
@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: "-".join(map(str, i)))
@pytest.mark.parametrize("kernel", TEMPLATES)
def test_spills_no_more_than_it_may(nvcc, tmp_path, kernel, instance, arch):
    iterations, head_steps, element = instance
    values = {
        "element": element,
        "dtype": "tested",
        "iterations": iterations,
        "head_steps": head_steps,
        "kind": "plain",
    }
    (tmp_path / "instance.cu").write_text(instance_of(TEMPLATES[kernel], values))
    [spilled] = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    allowed = DECODE_SPILLS if kernel == "decode" else LAYER_SPILLS
    assert spilled <= allowed[arch].get((iterations, head_steps), 0)


@pytest.mark.parametrize(
    ("arch", "instance"),
    [(arch, instance) for arch, all_spills in ANY_LAYER_SPILLS.items() for instance in all_spills],
)
def test_kernel_for_any_layers_spills_no_more_than_it_may(nvcc, tmp_path, arch, instance):
    iterations, head_steps, element = instance
    values = {
        "element": element,
        "dtype": "tested",
        "iterations": iterations,
        "head_steps": head_steps,
        "kind": "any",
    }
    (tmp_path / "instance.cu").write_text(instance_of(TEMPLATES["decode"], values))
    [spilled] = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled <= ANY_LAYER_SPILLS[arch][instance]


@pytest.mark.parametrize("instance", ROWS_SPILLS, ids=lambda i: "-".join(map(str, i)))
def test_kernel_for_rows_spills_no_more_than_it_may(nvcc, tmp_path, instance):
    operand_rows, pieces, head_steps = instance
    values = {
        "element": "__half",
        "dtype": "tested",
        "operand_rows": operand_rows,
        "pieces": pieces,
        "head_steps": head_steps,
    }
    (tmp_path / "instance.cu").write_text(instance_of(ROWS_TEMPLATE, values))
    [spilled] = spilled_bytes(nvcc, tmp_path / "instance.cu", "90a")
    assert spilled <= ROWS_SPILLS[instance]


@pytest.mark.parametrize("head_steps", GEMM_ATTENTION_SPILLS)
def test_attention_for_more_rows_spills_no_more_than_it_may(nvcc, tmp_path, head_steps):
    values = {"element": "__half", "dtype": "tested", "head_steps": head_steps}
    source = instance_of(GEMM / "attention_instance.cu.in", values)
    (tmp_path / "instance.cu").write_text(source)
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", "90a")
    assert spilled
    assert max(spilled) <= GEMM_ATTENTION_SPILLS[head_steps]


def test_products_of_more_rows_spill_nothing(nvcc, tmp_path):
    source = (GEMM / "product_kernel.cu").relative_to(ROOT / "src")
    (tmp_path / "instance.cu").write_text(f'#include "{source}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", "90a")
    assert spilled
    assert not any(spilled)


@pytest.mark.parametrize("arch", DECODE_SPILLS)
def test_products_of_prompts_spill_nothing(nvcc, tmp_path, arch):
    source = (CUDA / "prefill" / "matrix_product.cu").relative_to(ROOT / "src")
    (tmp_path / "instance.cu").write_text(f'#include "{source}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled
    assert not any(spilled)


@pytest.mark.parametrize("arch", DECODE_SPILLS)
def test_plain_layer_kernels_spill_nothing(nvcc, tmp_path, arch):
    (tmp_path / "instance.cu").write_text(f'#include "{PLAIN_LAYER.relative_to(ROOT / "src")}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled
    assert not any(spilled)


@pytest.mark.parametrize("arch", DECODE_SPILLS)
def test_attention_over_float32_spills_nothing(nvcc, tmp_path, arch):
    source = (CUDA / "prefill" / "float32_attention.cu").relative_to(ROOT / "src")
    (tmp_path / "instance.cu").write_text(f'#include "{source}"\n')
    spilled = spilled_bytes(nvcc, tmp_path / "instance.cu", arch)
    assert spilled
    assert not any(spilled)
