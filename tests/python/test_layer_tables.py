"""Results of the layer calls and of single kernels on their way into docs/; invented figures."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import layer_tables
import plot
import pytest
import update_readme

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {"device": "NVIDIA H100", "driver": ["580.1"], "torch": "2.11", "commit": "abc"}
CEILING = {"bytes_per_second": 3.21e12, "measured_by": "given"}
# Variant, and how often as fast as PyTorch, in the order in which ablation.py measures them.
VARIANTS = {
    "PyTorch": 1.0,
    "fused attention and MLP-up, PyTorch MLP-down": 1.5,
    "PyTorch attention and MLP-up, fused MLP-down": 1.2,
    "fused, split": 2.0,
    "fused": 2.2,
    "fused, graph context": 2.1,
}
POSITIONS = (16, 128, 512, 1024, 2047)


def ablation() -> dict:
    rows = []
    for position in POSITIONS:
        for variant, speedup in VARIANTS.items():
            for mode, slower in (("eager", 2.0), ("graph", 1.0)):
                seconds = 4e-3 * (1 + position / 10_000) * slower / speedup
                rows.append(
                    {
                        "position": position,
                        "variant": variant,
                        "mode": mode,
                        "seconds_per_token": seconds,
                        "seconds_per_layer": seconds / 32,
                        "speedup": speedup,
                        "share_of_ceiling": 1.6e-3 / seconds,
                        "relative_error": 1e-4 * speedup * (1 + position / 10_000),
                    }
                )
    return {
        "machine": MACHINE,
        "model": "pythia_2b8",
        "dtype": "float16",
        "layers": 32,
        "rounds": 20,
        "ceiling": CEILING,
        "results": rows,
    }


def layer_calls() -> dict:
    def side(us: float, error: float) -> dict:
        return {"us": us, "low": us - 0.1, "high": us + 0.2, "relative_error": error}

    def row(call: str, context: int | None, ours: float, theirs: float) -> dict:
        return {
            "call": call,
            "context": context,
            "bytes_read": 1,
            "clusterfusion": side(ours, 2e-4),
            "pytorch": side(theirs, 3e-4),
            "share_of_ceiling": 0.8766,
        }

    calls = [row("mlp_only", None, 18.0, 27.0), row("decoder_layer", 2047, 60.0, 125.0)]
    return {
        "machine": MACHINE,
        "dtype": "float16",
        "rounds": 50,
        "mode": "CUDA graph",
        "ceiling": CEILING | {"measured_by": "torch.sum"},
        "models": [{"model": "pythia_2b8", "layers": 32, "calls": calls}],
    }


def call_overhead() -> dict:
    names = ("a model's decoder_layer", "a model's attention_only", "decoder_layer, out")
    times = {name: {"median": 7.46, "smallest": 7.24} for name in names}
    return {"readings": [{"host": "A", "machine": MACHINE, "microseconds_per_call": times}]}


def sample_time() -> list[dict]:
    kernels = [
        {"logits": logits, "setting": setting, "us": us, "low": us - 1, "high": us + 1}
        for logits, us in (("spread 3", 10.0), ("equal", 20.0))
        for setting in ("top_k 50", "everything")
    ]
    return [
        {"device": "NVIDIA H100, 132 SMs", "vocab": 50304, "repeats": 200, "steps": 16}
        | {"kernels": kernels}
    ]


FILES = {
    "ablation_h100.json": ablation(),
    "layer_calls_h100.json": layer_calls(),
    "sample_time_h100.json": sample_time(),
}


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of the result files."""
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path)
    return tmp_path


def cells(markdown: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]


def test_each_call_beside_pytorch():
    text = layer_tables.layer_calls_table(layer_calls())
    assert "32 layers of pythia_2b8" in text and "driver 580.1" in text
    assert "3.21 TB/s, as torch.sum measures it" in text
    _, _, down, whole = cells(text)
    assert down == [
        *("`pythia_2b8_mlp_only`", "any", "**18.0 (17.9 to 18.2)**", "27.0 (26.9 to 27.2)"),
        *("1.50", "87.7 %", "2.0e-04", "3.0e-04"),
    ]
    assert whole[:2] == ["`pythia_2b8_decoder_layer`", "2047"]
    assert layer_tables.call_text("gpt_neox_20b", "mlp_only") == "gpt_neox_20b: mlp only"


def test_options_beside_the_plain_call():
    times = {"us": 60.0, "low": 59.9, "high": 60.2, "share_of_ceiling": 0.9}
    cases = [
        times | {"case": "plain", "context": 128, "times_plain": 1.0},
        times | {"case": "pages of 16", "context": 128, "times_plain": 1.0123},
    ]
    common = {"machine": MACHINE, "ceiling": CEILING, "dtype": "float16", "mode": "CUDA graph"}
    result = common | {"model": "pythia_2b8", "layers": 32, "rounds": 50, "cases": cases}
    text = layer_tables.layer_options_table(result)
    assert "layer of pythia_2b8" in text and "50 rounds" in text
    *_, row = cells(text)
    assert row == ["pages of 16", "128", "**60.0 (59.9 to 60.2)**", "1.012", "90.0 %"]
    assert layer_tables.layer_options_table(None) == ""


def test_call_overhead():
    _, _, row = cells(layer_tables.call_overhead_table(call_overhead(), None))
    assert row[0] == "H100, host A"
    assert row[1:3] == ["7.5 (7.2)", "7.5 (7.2)"]
    assert row[3].strip() == "", "not measured"
    assert layer_tables.call_overhead_table(None, None) == ""


def test_ablation_by_mode():
    text = layer_tables.ablation_tables(ablation())
    rows = cells(text)
    assert rows[0] == ["ms a token, in CUDA graphs", *map(str, POSITIONS), "error"]
    assert rows[2][:2] == ["PyTorch", "4.006 (1.00, 40 %)"]
    assert rows[6][0] == "fused" and rows[6][1] == "1.821 (2.20, 88 %)"
    assert rows[6][-1] == "2.7e-04", "the largest of all positions"
    assert rows[8][0] == "ms a token, eager"
    assert rows[10][1] == "8.013 (1.00, 20 %)"
    assert len(rows) == 2 * (2 + len(VARIANTS))
    assert "images/layer_ablation.svg" in text


def test_ablation_without_graphs():
    eager = ablation()
    eager["results"] = [row for row in eager["results"] if row["mode"] == "eager"]
    text = layer_tables.ablation_tables(eager)
    assert "CUDA graphs" not in text and "svg" not in text
    assert len(cells(text)) == 2 + len(VARIANTS)


def test_sampling_kernel():
    text = layer_tables.sample_time_table(sample_time())
    rows = cells(text)
    assert rows[0] == ["µs a token", "logits: spread 3", "logits: equal"]
    assert rows[2] == ["top_k 50", "10.0 (9.0 to 11.0)", "20.0 (19.0 to 21.0)"]
    assert "50304 random logits" in text


@pytest.mark.parametrize("name", FILES)
def test_a_document_has_a_table_as_soon_as_there_is_a_result(results, name):
    def filled() -> dict[Path, str]:
        documents = update_readme.documents().items()
        return {path: fill(path.read_text(encoding="utf-8")) for path, fill in documents}

    without = filled()
    (results / name).write_text(json.dumps(FILES[name]))
    changed = [path for path, text in filled().items() if text != without[path]]
    assert len(changed) == 1 and changed[0].parent == update_readme.DOCS
    text = filled()[changed[0]]
    assert "NVIDIA H100" in text
    assert text.count("|---") > without[changed[0]].count("|---")
    (results / name).unlink()
    assert update_readme.documents()[changed[0]](text) == without[changed[0]]


def test_ablation_is_drawn_to_scale(results):
    assert plot.pictures(results) == {}
    (results / "ablation_h100.json").write_text(json.dumps(ablation()))
    ((name, content),) = plot.pictures(results).items()
    assert name == "layer_ablation.svg"
    picture = ElementTree.fromstring(content)
    texts = list(picture.iter(f"{SVG}text"))
    for words in ("PyTorch", "fused", "graph context", "floor: memory's speed"):
        assert words in [element.text for element in texts]
    ticks = {t.text: float(t.get("y")) for t in texts if t.get("text-anchor") == "end"}
    zero, four = ticks["0"], ticks["4"]
    for style, variant in (("c0", "fused"), ("c1", "PyTorch"), ("c5", "fused, graph context")):
        heights = [
            float(circle.get("cy"))
            for circle in picture.iter(f"{SVG}circle")
            if circle.get("class") == style
        ]
        milliseconds = [(zero - 4 - height) / (zero - four) * 4 for height in heights]
        expected = [4 * (1 + position / 10_000) / VARIANTS[variant] for position in POSITIONS]
        assert milliseconds == pytest.approx(expected, abs=0.01)
    places = sorted(
        float(element.get("y"))
        for element in texts
        if float(element.get("x")) > plot.WIDTH - plot.RIGHT
    )
    assert all(b - a >= plot.LABEL_LINE - 0.1 for a, b in itertools.pairwise(places))
