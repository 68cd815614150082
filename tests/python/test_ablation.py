"""The program that measures what the layer calls gain, on a tiny model on the CPU."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("torch", reason="torch is not installed")


def test_ablation(tmp_path):
    output = tmp_path / "ablation.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/ablation.py", "--model", "tiny"),
            *("--device", "cpu", "--layers", "3", "--contexts", "0", "5", "--rounds", "2"),
            *("--ceiling", "1e10", "--output", output),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["ceiling"] == {"bytes_per_second": 1e10, "measured_by": "given"}
    assert result["machine"]["device"].startswith("CPU")
    rows = result["results"]
    variants = {row["variant"] for row in rows}
    assert len(variants) == 6
    assert {(r["position"], r["variant"]) for r in rows} == {
        (p, v) for p in (0, 5) for v in variants
    }
    weights = 3 * 2 * 64 * (4 * 64 + 2 * 256)
    for row in rows:
        assert row["mode"] == "eager"
        assert row["relative_error"] < 1e-3
        assert row["seconds_per_layer"] == pytest.approx(row["seconds_per_token"] / 3)
        bytes_read = weights + 3 * 2 * 2 * 64 * row["position"]
        assert row["share_of_ceiling"] * row["seconds_per_token"] == pytest.approx(
            bytes_read / 1e10
        )
        (baseline,) = (
            r["seconds_per_token"]
            for r in rows
            if r["variant"] == "PyTorch" and r["position"] == row["position"]
        )
        assert row["speedup"] == pytest.approx(baseline / row["seconds_per_token"])
        assert row["variant"] in done.stderr
