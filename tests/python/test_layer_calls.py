"""The programs that time layer calls and what they cost from Python, on the CPU."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("torch", reason="torch is not installed")

# Bytes of 16-bit matrices of a layer with hidden 64 and intermediate 256.
FIRST_HALF = 2 * 64 * (4 * 64 + 256)
SECOND_HALF = 2 * 64 * 256


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, str]:
    output = tmp_path_factory.mktemp("layer_calls") / "layer_calls.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/layer_calls.py", "--model", "tiny"),
            *("--device", "cpu", "--layers", "3", "--contexts", "0", "5", "--rounds", "3"),
            *("--ceiling", "1e10", "--output", output),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stderr


def test_each_call_is_measured(measured):
    result, table = measured
    assert result["ceiling"] == {"bytes_per_second": 1e10, "measured_by": "given"}
    assert (result["mode"], result["dtype"], result["rounds"]) == ("eager", "float16", 3)
    (model,) = result["models"]
    assert (model["model"], model["layers"]) == ("tiny", 3)
    whole = ("decoder_layer", "decoder_layer_split")
    expected = [("mlp_only", None, SECOND_HALF)]
    for context in (0, 5):
        first = FIRST_HALF + 2 * 2 * 64 * context
        expected.append(("attention_only", context, first))
        expected += [(name, context, first + SECOND_HALF) for name in whole]
    assert [(r["call"], r["context"], r["bytes_read"]) for r in model["calls"]] == expected
    assert all(name in table for name, _, _ in expected)


def test_figures_can_be(measured):
    (model,) = measured[0]["models"]
    for row in model["calls"]:
        for side in (row["clusterfusion"], row["pytorch"]):
            assert 0 < side["low"] <= side["us"] <= side["high"]
            assert 0 < side["relative_error"] < 1e-3
        assert row["share_of_ceiling"] * row["clusterfusion"]["us"] == pytest.approx(
            row["bytes_read"] / 1e10 * 1e6
        )


def test_options_are_measured(tmp_path):
    output = tmp_path / "layer_options.json"
    script = ROOT / "benchmarks" / "layer_options.py"
    arguments = ["--model", "tiny", "--device", "cpu", "--layers", "2", "--contexts", "0", "20"]
    more = ["--rounds", "3", "--ceiling", "1e10", "--output", output]
    subprocess.run([sys.executable, script, *arguments, *more], check=True, capture_output=True)
    rows = json.loads(output.read_text(encoding="utf-8"))["cases"]
    names = ["plain", "pages of 16", "pages of 64", "multi-query", "groups of 4"]
    names += ["4 rows, pages of 16", "16 rows, pages of 16"]
    assert [(r["case"], r["context"]) for r in rows] == [(n, c) for c in (0, 20) for n in names]
    weights, cache = FIRST_HALF + SECOND_HALF, 2 * 2 * 64 * 20
    assert [r["bytes_read"] for r in rows[7:]] == [
        *[weights + cache] * 3,
        *[weights - 2 * 64 * 64 + cache // 2] * 2,
        *(weights + rows * cache for rows in (4, 16)),
    ]
    for row in rows:
        assert 0 < row["low"] <= row["us"] <= row["high"]
        plain = rows[0 if row["context"] == 0 else 7]
        assert row["times_plain"] == pytest.approx(row["us"] / plain["us"])


def test_overhead_is_measured(tmp_path):
    output = tmp_path / "overhead.json"
    script = ROOT / "benchmarks" / "call_overhead.py"
    command = [sys.executable, script, "--device", "cpu", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    overhead = json.loads(output.read_text(encoding="utf-8"))["microseconds_per_call"]
    assert {"decoder_layer", "mlp_down", "attention_mlp_up, out", "torch.add, out"} <= set(overhead)
    assert all(0 < times["smallest"] <= times["median"] for times in overhead.values())
