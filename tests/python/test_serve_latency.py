"""benchmarks/serve_latency.py on the demo model, and its figures on their way to the docs."""

import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import gpu_results
import plot
import pytest
import update_readme
from conftest import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_it_measures_server_and_engine(demo_model, tmp_path):
    pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
    output = tmp_path / "result.json"
    command = [sys.executable, ROOT / "benchmarks/serve_latency.py", "--model", demo_model]
    command += ["--clients", 1, 3, "--prompt-tokens", 20, "--new-tokens", 12, "--rounds", 2]
    command += ["--name", "a model", "--commit", "abc", "--output", output]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    result = json.loads(output.read_text())
    assert (result["model"], result["commit"], result["prompt_tokens"]) == ("a model", "abc", 20)
    assert "--clients 1 3" in result["command"]
    assert [row["clients"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["streams"] >= 20 and row["texts_that_differ"] == 0
        for side in (row["server"], row["engine"]):
            for measure in ("first_token_ms", "per_token_ms"):
                assert 0 < side[measure]["median"] <= side[measure]["p95"]
            assert side["tokens_per_second"] > 0
        # All of a stream, from its first token to its last, lies within its round.
        one = row["server"]
        whole = one["first_token_ms"]["median"] + 11 * one["per_token_ms"]["median"]
        assert row["clients"] * 12 / one["tokens_per_second"] * 1e3 > 0.5 * whole


def test_too_many_tokens_are_refused(demo_model):
    pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
    command = [sys.executable, ROOT / "benchmarks/serve_latency.py", "--model", demo_model]
    command += ["--clients", 1, "--prompt-tokens", 1000, "--new-tokens", 100, "--rounds", 1]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "no room" in ended.stderr, ended.stderr


def invented() -> dict:
    def side(first: float, per: float) -> dict:
        return {
            "first_token_ms": {"median": first, "p95": 2 * first},
            "per_token_ms": {"median": per, "p95": 2 * per},
            "tokens_per_second": 1000 / per,
        }

    rows = [
        {"clients": clients, "server": side(4.0 * clients, 1.5), "engine": side(3.0, 1.25)}
        for clients in (1, 8, 64)
    ]
    names = {"device": "NVIDIA H200, 132 SMs", "model": "pythia-2.8b"}
    return {**names, "prompt_tokens": 128, "new_tokens": 128, "rows": rows}


RIVAL = json.loads((gpu_results.RESULTS / "serving_vllm_h200.json").read_text())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "serving_latency_h200.json").write_text(json.dumps(invented()))
    (tmp_path / "serving_vllm_h200.json").write_text(json.dumps(RIVAL))
    return tmp_path


def test_times_are_drawn_to_scale(folder):
    drawn = plot.pictures(folder)
    assert set(drawn) == {"serving_first_token_h200.svg", "serving_per_token_h200.svg"}
    picture = ElementTree.fromstring(drawn["serving_first_token_h200.svg"])
    labels = [element.text for element in picture.iter(f"{SVG}text")]
    assert {"ClusterFusion's server", "the engine alone", "vLLM 0.24.0's server"} <= set(labels)
    assert f"recorded {RIVAL['date']}" in labels

    def heights(style: str) -> list[float]:
        found = (one for one in picture.iter(f"{SVG}circle") if one.get("class") == style)
        return [float(one.get("cy")) for one in found]

    server, engine, rival = map(heights, ("c0", "c1", "c2"))
    assert len(server) == 3 and len(rival) == 4 and len(set(engine)) == 1
    doubled = (server[0] - server[2]) / math.log2(64)  # the axis is logarithmic
    assert engine[0] - server[0] == pytest.approx(doubled * math.log2(4 / 3), abs=0.2)
    assert server[0] - rival[0] == pytest.approx(doubled * math.log2(16 / 4), abs=0.2)


PARTS = "".join(f"<!-- {n} -->\nold\n<!-- end {n} -->\n" for n in ("crowd", "serving times"))


def test_times_are_tabulated(folder, monkeypatch):
    monkeypatch.setattr(update_readme, "RESULTS", folder)
    table = update_readme.serving(PARTS)
    assert "old" not in table and "images/serving_per_token_h200.svg" in table
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["first token, ms: **server**"][1] == "32.00 (p95 64.00)"
    assert cells["a token, ms: engine alone"] == ["1.25 (p95 2.50)"] * 3
    recorded = f"a token, ms: vLLM 0.24.0's server, recorded {RIVAL['date']}"
    assert cells[recorded] == ["2.8", "3.1", "6.8"]
    assert re.search(r"^pythia-2.8b on NVIDIA H200, .*128 \+ 128 tokens", table, re.MULTILINE)


def test_a_rival_of_other_requests_is_left_out(folder, monkeypatch):
    (folder / "serving_vllm_h200.json").write_text(json.dumps({**RIVAL, "prompt_tokens": 64}))
    assert "vLLM" not in plot.pictures(folder)["serving_per_token_h200.svg"]
    monkeypatch.setattr(update_readme, "RESULTS", folder)
    assert "vLLM" not in update_readme.serving_table()
    (folder / "serving_latency_h200.json").unlink()
    assert plot.pictures(folder) == {} and update_readme.serving_table() == ""
