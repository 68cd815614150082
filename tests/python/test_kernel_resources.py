"""What ptxas says of the kernels' registers, in the build that CLUSTERFUSION_BUILD_DIR names: all
kernels, for all architectures that it has. The build keeps that beside its objects.

A spilled register costs a trip to L2 behind the weights, so the instances that matter most spill
nothing, and none may begin to spill more than it does.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LAUNCHER = ROOT / "cmake" / "keep_ptxas_report.sh"
# Bytes that a kernel may store and load again, by compute capability; what is not here spills
# nothing. The last argument of decode_kernel says which layers: plain ones (0) or any (1).
SPILLS = {
    "90": {
        "decode_kernel<__half, 10, 16, (plan::LayerKind)0>": 68,
        "decode_kernel<__half, 10, 16, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 10, 5, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 10, 8, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 5, 16, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 5, 5, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 5, 8, (plan::LayerKind)1>": 16,
        "decode_kernel<__half, 8, 8, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 10, 16, (plan::LayerKind)0>": 68,
        "decode_kernel<__nv_bfloat16, 10, 16, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 10, 5, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 10, 8, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 5, 16, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 5, 5, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 5, 8, (plan::LayerKind)1>": 16,
        "decode_kernel<__nv_bfloat16, 8, 8, (plan::LayerKind)1>": 16,
        "gemm::attention_kernel<__half, 8>": 44,
        "gemm::attention_kernel<__nv_bfloat16, 8>": 44,
        "residual_kernel<__nv_bfloat16, 12>": 20,
        "stream::stream_kernel<__half, 16, 2, 16>": 8,
        "stream::stream_kernel<__half, 16, 2, 5>": 8,
        "stream::stream_kernel<__half, 16, 2, 8>": 8,
        "stream::stream_kernel<__half, 16, 4, 16>": 1088,
        "stream::stream_kernel<__half, 16, 4, 8>": 1224,
        "stream::stream_kernel<__half, 8, 2, 16>": 24,
        "stream::stream_kernel<__half, 8, 4, 16>": 8,
        "stream::stream_kernel<__half, 8, 4, 8>": 8,
        "stream::stream_kernel<__nv_bfloat16, 16, 2, 16>": 8,
        "stream::stream_kernel<__nv_bfloat16, 16, 2, 5>": 8,
        "stream::stream_kernel<__nv_bfloat16, 16, 2, 8>": 8,
        "stream::stream_kernel<__nv_bfloat16, 16, 4, 16>": 1088,
        "stream::stream_kernel<__nv_bfloat16, 16, 4, 8>": 1224,
        "stream::stream_kernel<__nv_bfloat16, 8, 2, 16>": 24,
        "stream::stream_kernel<__nv_bfloat16, 8, 4, 16>": 8,
        "stream::stream_kernel<__nv_bfloat16, 8, 4, 8>": 8,
    },
    # Here ptxas ignores setmaxnreg, so there are fewer registers.
    "120": {
        "decode_kernel<__half, 10, 16, (plan::LayerKind)0>": 548,
        "decode_kernel<__half, 10, 16, (plan::LayerKind)1>": 108,
        "decode_kernel<__half, 10, 5, (plan::LayerKind)0>": 24,
        "decode_kernel<__half, 10, 8, (plan::LayerKind)0>": 220,
        "decode_kernel<__half, 5, 16, (plan::LayerKind)0>": 164,
        "decode_kernel<__nv_bfloat16, 10, 16, (plan::LayerKind)0>": 544,
        "decode_kernel<__nv_bfloat16, 10, 16, (plan::LayerKind)1>": 108,
        "decode_kernel<__nv_bfloat16, 10, 5, (plan::LayerKind)0>": 240,
        "decode_kernel<__nv_bfloat16, 10, 8, (plan::LayerKind)0>": 260,
        "decode_kernel<__nv_bfloat16, 5, 16, (plan::LayerKind)0>": 164,
        "layer_kernel<__half, 10, 16, RowCache>": 36,
        "layer_kernel<__half, 5, 16, RowCache>": 36,
        "layer_kernel<__nv_bfloat16, 10, 16, RowCache>": 36,
        "layer_kernel<__nv_bfloat16, 5, 16, RowCache>": 36,
    },
}


def spilled_bytes(report: str) -> dict[tuple[str | None, str | None], int]:
    """By architecture and function, what is stored and loaded again, as `ptxas -v` says."""
    spilled: dict[tuple[str | None, str | None], int] = {}
    architecture = function = None
    for line in report.splitlines():
        if "bytes gmem" in line:  # the next architecture's code
            architecture = function = None
        elif entry := re.search(r"Compiling entry function '\S+' for 'sm_(\w+)'", line):
            architecture = entry[1]
        elif properties := re.search(r"Function properties for (\S+)", line):
            function = properties[1]
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            key = (architecture, function)
            spilled[key] = max(spilled.get(key, 0), sum(map(int, spills.groups())))
    return spilled


def names_of(functions: list[str]) -> list[str]:
    """Functions with their template arguments, without parameters and what all names begin with."""
    demangled = subprocess.run(
        ["c++filt", "--no-params"],
        input="\n".join(functions),
        capture_output=True,
        text=True,
        check=True,
    )
    common = r"_INTERNAL_\w+::|clusterfusion::(cuda::)?|\(anonymous namespace\)::"
    return [re.sub(common, "", name) for name in demangled.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports(build_dir) -> dict[Path, set[str]]:
    """The file of each CUDA object that keeps what ptxas said, and the object's architectures."""
    commands = [
        (Path(entry["directory"]), shlex.split(entry["command"]))
        for entry in json.loads((build_dir / "compile_commands.json").read_text())
        if entry["file"].endswith(".cu")
    ]
    if not commands:
        pytest.skip(f"{build_dir} has no CUDA code")
    found = {}
    for folder, command in commands:
        if re.search("-DCLUSTERFUSION_(AS_CHIP|RACECHECK)", shlex.join(command)):
            pytest.skip(f"{build_dir} has kernels for tests alone")
        if "-Xptxas=-v" in command:
            report = folder / (command[command.index("-o") + 1] + ".ptxas")
            found[report] = set(re.findall(r"code=\[?sm_(\w+)", shlex.join(command)))
    assert found, "no CUDA file is compiled with -Xptxas=-v"
    return found


@pytest.fixture(scope="module")
def spilled(reports) -> dict[str, dict[str, int]]:
    """By compute capability and kernel, what is stored and loaded again in the build."""
    of_functions: dict[tuple[str, str], int] = {}
    for report in reports:
        for (architecture, function), spills in spilled_bytes(report.read_text()).items():
            key = (str(architecture).removesuffix("a"), str(function))
            of_functions[key] = max(of_functions.get(key, 0), spills)
    names = names_of([function for _, function in of_functions])
    found: dict[str, dict[str, int]] = {}
    for ((capability, _), spills), name in zip(of_functions.items(), names, strict=True):
        kernels = found.setdefault(capability, {})
        kernels[name] = max(kernels.get(name, 0), spills)
    return found


def test_every_object_has_its_report(reports):
    missing = [str(report) for report in reports if not report.exists()]
    assert not missing, f"the build left no {missing}; build these objects anew"
    for report, architectures in reports.items():
        said = {architecture for architecture, _ in spilled_bytes(report.read_text())}
        assert said == architectures, report


@pytest.mark.parametrize("capability", SPILLS)
def test_kernels_spill_no_more_than_they_may(spilled, capability):
    if capability not in spilled:
        pytest.skip(f"the build has no code for compute capability {capability}")
    allowed = SPILLS[capability]
    more = [
        f'"{name}": {spills},  # {allowed.get(name, 0)} allowed'
        for name, spills in sorted(spilled[capability].items())
        if spills > allowed.get(name, 0)
    ]
    assert not more, "\n".join([f"kernels for {capability} spill more than they may:", *more])


DECODE = (
    "_ZN13clusterfusion4cuda13decode_kernelI6__halfLi5ELi5ELNS_4plan9LayerKindE1EEE"
    "vNS0_12DecodeParamsE"
)
ACTIVATED = (
    "_ZN42_INTERNAL_7449b37b_11_instance_cu_f8c2bb0713clusterfusion4cuda"
    "44_GLOBAL__N__7449b37b_11_instance_cu_f8c2bb079activatedI6__halfEEjNS0_10ActivationEff"
)
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{DECODE}' for 'sm_90a'
ptxas info    : Function properties for {DECODE}
    16 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 5505.573 ms
ptxas info    : 0 bytes gmem, 12 bytes cmem[4]
ptxas info    : Compiling entry function '{DECODE}' for 'sm_120'
ptxas info    : Function properties for {DECODE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1712 bytes cmem[0], 120 bytes cmem[2]
ptxas info    : Compile time = 2418.299 ms
ptxas info    : Function properties for {ACTIVATED}
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""


def test_reports_are_read():
    assert spilled_bytes(REPORT) == {
        ("90a", DECODE): 36,
        ("120", DECODE): 0,
        ("120", ACTIVATED): 12,
    }
    assert names_of([DECODE, ACTIVATED]) == [
        "decode_kernel<__half, 5, 5, (plan::LayerKind)1>",
        "activated<__half>",
    ]


def test_launcher_keeps_the_report_and_prints_the_rest(tmp_path):
    first, second = (
        "kernel.cu(5): warning #177-D: variable was declared but never referenced\n",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized\n",
    )
    compiler = tmp_path / "a compiler"
    compiler.write_text(
        f"#!/bin/sh\ncat <<'END' >&2\n{first}{REPORT}{second}END\necho \"$3\"\nexit 3\n"
    )
    compiler.chmod(0o755)
    command = ["sh", LAUNCHER, compiler, "-o", "an object.o", "two  words"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stdout == "two  words\n"
    assert result.stderr == first + second
    assert (tmp_path / "an object.o.ptxas").read_text() == REPORT
    assert len(list(tmp_path.iterdir())) == 2
