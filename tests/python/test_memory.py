"""Weights are used in place: resident memory stays below mapped weights + KV cache + 150 MB.

The shape of pythia-160m in each run; that of pythia-2.8b, which needs 6 GB of disk and of memory,
if CLUSTERFUSION_LARGE_TESTS=1. Its figures go to benchmarks/results/memory_2b8.json.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoints import write_pythia_checkpoint

ALLOWED_BYTES = 150e6
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LARGE = os.environ.get("CLUSTERFUSION_LARGE_TESTS") == "1"

# Prefills, decodes and scores in a process of its own, then reads the high-water marks that Linux
# keeps. VmHWM is the peak of everything resident: RssFile (the mapped weights and the libraries'
# code) and RssAnon (what was allocated: the KV cache, activations, Python and NumPy).
MEASURE = """
    import json, sys

    def resident():
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        names = ("VmHWM", "RssAnon", "RssFile")
        return {name: int(lines[name].split()[0]) * 1024 for name in names}

    import clusterfusion
    before = resident()
    engine = clusterfusion.Engine(sys.argv[1], device="cpu")
    opened = resident()
    prompt = [(7 * i) % 5000 for i in range(520)]
    result = engine.generate(prompt, max_new_tokens=8, ignore_eos=True)
    engine.score(prompt[:64])
    assert len(result.tokens) == 8
    info = engine.info
    json.dump(
        {
            "before": before,
            "opened": opened,
            "ended": resident(),
            "positions": len(prompt) + len(result.tokens),
            "kv_bytes_per_position": info.kv_bytes_per_position,
            "weight_bytes": info.total_bytes,
            "device": info.device_description,
        },
        sys.stdout,
    )
"""


def measure(folder: Path) -> dict:
    """Figures in bytes, and how many of them are neither weights nor KV cache."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), folder],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    pages = -(-figures["positions"] // 64)  # of 64 positions; score() needs fewer, afterwards
    figures["kv_bytes"] = pages * 64 * figures["kv_bytes_per_position"]
    peak, weights = figures["ended"]["VmHWM"], figures["weight_bytes"]
    figures["overhead_bytes"] = peak - weights - figures["kv_bytes"]
    figures["allocated_bytes"] = figures["ended"]["RssAnon"] - figures["kv_bytes"]
    return figures


def check(figures: dict) -> None:
    assert figures["opened"]["RssAnon"] - figures["before"]["RssAnon"] < ALLOWED_BYTES / 3
    assert figures["overhead_bytes"] < ALLOWED_BYTES, figures
    # Not all of the embedding is touched, so that alone would let something be copied.
    assert figures["allocated_bytes"] < ALLOWED_BYTES, figures
    # The measure sees the weights: they were all read, from the file's own pages.
    assert figures["ended"]["RssFile"] > 0.6 * figures["weight_bytes"], figures


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [("float16", "safetensors"), ("float32", "safetensors"), ("float16", "torch")],
)
def test_resident_memory(tmp_path, dtype, weights):
    figures = measure(write_pythia_checkpoint(tmp_path, "pythia-160m", dtype, weights=weights))
    print(figures)
    check(figures)


@pytest.mark.skipif(not LARGE, reason="needs 6 GB of disk and memory: CLUSTERFUSION_LARGE_TESTS=1")
def test_resident_memory_of_2b8(tmp_path):
    folder = write_pythia_checkpoint(tmp_path, "pythia-2.8b", "float16")
    try:
        figures = measure(folder)
    finally:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory_2b8.json").write_text(json.dumps(figures, indent=2) + "\n")
    check(figures)
