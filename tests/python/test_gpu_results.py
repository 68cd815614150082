"""The GPU's results on their way to the README: collected, drawn, tabulated; invented figures."""

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import collect_gpu
import gpu_results
import plot
import pytest
import update_readme

SVG = "{http://www.w3.org/2000/svg}"


def rows(base: float, share: float | None = None) -> list[dict]:
    """Measurements of four contexts, slower with each."""
    measured = []
    for i, context in enumerate((16, 128, 1024, 2047)):
        row = {"context": context, "ms_per_token": base * (1 + i / 10)}
        row |= {"low": row["ms_per_token"] * 0.99, "high": row["ms_per_token"] * 1.02}
        measured.append(row | ({"ceiling_share": share - i / 100} if share else {}))
    return measured


def models(device: str, share: float) -> list[dict]:
    sizes = {"pythia-14m": 0.1, "pythia-2.8b": 1.7, "pythia-12b": 7.2}
    return [
        {
            "model": name,
            "device": device,
            "read_ceiling_bytes_per_second": 3.2e12,
            "contexts": rows(base, share),
        }
        for name, base in sizes.items()
    ]


RIVALS = {
    "shape": "pythia-2.8b",
    "torch": "2.0",
    "transformers": "5.0",
    "rivals": [
        {"name": "PyTorch functional layers, CUDA graph", "contexts": rows(4.2)},
        {"name": "transformers, eager <&>", "contexts": rows(60.0)},
        {"name": "transformers, compiled", "contexts": [], "error": "TimeoutError: not done"},
    ],
    "prefill": [],
}
ABOUT = {"driver": "580.1", "commit": "abc", "date": "2026-01-01", "command": "decode_time"}


@pytest.fixture
def results() -> dict[str, dict]:
    return {
        "H100": collect_gpu.collect(models("NVIDIA H100", 0.95), RIVALS, ABOUT),
        "H200": collect_gpu.collect(models("NVIDIA H200", 0.92), {}, ABOUT),
    }


@pytest.fixture
def folder(results, tmp_path) -> Path:
    for chip, result in results.items():
        (tmp_path / f"gpu_{chip.lower()}.json").write_text(json.dumps(result))
    return tmp_path


def test_collect_writes_what_the_programs_printed(tmp_path, monkeypatch):
    for name, content in (("m", models("NVIDIA H100", 0.95)), ("r", RIVALS)):
        (tmp_path / name).write_text(json.dumps(content))
    arguments = ["--models", tmp_path / "m", "--rivals", tmp_path / "r", "--driver", "580.1"]
    arguments += ["--commit", "abc", "--command", "x", "--output", tmp_path / "gpu_h100.json"]
    arguments += ["--remark", "Rivals on another day."]
    monkeypatch.setattr(sys, "argv", ["collect_gpu", *map(str, arguments)])
    collect_gpu.main()
    (result,) = gpu_results.load_results(tmp_path).values()
    assert result["models"] == models("NVIDIA H100", 0.95)
    assert result["rivals"] == RIVALS["rivals"]
    assert (result["driver"], result["commit"], result["torch"]) == ("580.1", "abc", "2.0")
    assert "transformers 5.0. Rivals on another day.\n\n|" in update_readme.gpu_compared_table(
        "H100", result, "the same"
    )
    del result["remark"]
    assert "transformers 5.0.\n\n|" in update_readme.gpu_compared_table("H100", result, "the same")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 9.0}, "0 < low <= ms_per_token"),
        ({"ms_per_token": None}, "expected numbers ms_per_token"),
        ({"ceiling_share": "95 %"}, "expected numbers ceiling_share"),
    ],
)
def test_collect_refuses_figures_that_cannot_be(change, message):
    broken = models("NVIDIA H100", 0.95)
    broken[1]["contexts"][2] |= change
    with pytest.raises(SystemExit, match=f"pythia-2.8b: .*{message}"):
        collect_gpu.collect(broken, RIVALS, ABOUT)


def test_collect_refuses_two_devices_and_another_shape():
    both = models("NVIDIA H100", 0.95) + models("NVIDIA H200", 0.95)
    with pytest.raises(SystemExit, match="one device"):
        collect_gpu.collect(both, RIVALS, ABOUT)
    with pytest.raises(SystemExit, match="pythia-1b"):
        collect_gpu.collect(both[:3], RIVALS | {"shape": "pythia-1b"}, ABOUT)


def circles(picture: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    return [
        (float(circle.get("cx")), float(circle.get("cy")))
        for circle in picture.iter(f"{SVG}circle")
        if circle.get("class") == style
    ]


def test_decode_time_is_drawn_to_scale(folder):
    picture = ElementTree.fromstring(plot.pictures(folder)["decode_time_h100.svg"])
    labels = [element.text for element in picture.iter(f"{SVG}text")]
    for words in (
        "ClusterFusion",
        "PyTorch functional layers",
        "eager <&>",
        "floor: memory's speed",
    ):
        assert words in labels
    assert "compiled" not in labels, "nothing to draw of a rival that did not run"

    ours, graph = circles(picture, "c0"), circles(picture, "c1")
    assert len(ours) == len(graph) == 4
    # The axis is logarithmic: the same ratio is the same distance, and up is slower.
    ratios = [below[1] - above[1] for below, above in zip(ours, graph, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4, abs=0.2) and ratios[0] > 0
    heights = {text: y for text, y in tick_heights(picture).items()}
    decade = heights["1"] - heights["10"]
    assert ratios[0] == pytest.approx(decade * 0.39279, abs=0.3), "log10(4.2 / 1.7)"
    # Contexts are linear.
    assert (ours[3][0] - ours[2][0]) / (ours[2][0] - ours[0][0]) == pytest.approx(
        (2047 - 1024) / (1024 - 16), abs=0.01
    )
    (floor,) = (p for p in picture.iter(f"{SVG}path") if p.get("class") == "floor")
    floor_heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", floor.get("d"))]
    assert all(low > own for low, (_, own) in zip(floor_heights, ours, strict=True))


def tick_heights(picture: ElementTree.Element) -> dict[str, float]:
    return {
        element.text: float(element.get("y"))
        for element in picture.iter(f"{SVG}text")
        if element.get("text-anchor") == "end"
    }


def test_decode_time_is_drawn_for_each_chip(folder):
    picture = ElementTree.fromstring(plot.pictures(folder)["decode_time_h200.svg"])
    labels = [element.text for element in picture.iter(f"{SVG}text")]
    assert "ClusterFusion" in labels and "floor: memory's speed" in labels
    assert any(label.startswith("H200, float16") for label in labels)
    assert len(circles(picture, "c0")) == 4 and not circles(picture, "c1"), "no rivals measured"
    (folder / "gpu_h200.json").unlink()
    assert set(plot.pictures(folder)) == {"decode_time_h100.svg", "ceiling_share.svg"}


def test_steps_of_several_sequences_are_drawn_to_scale(folder):
    def step(kernel, rows, time, context=128):
        share = 0.9 if rows == 1 else 0.5
        return {
            "kernel": kernel,
            "rows": rows,
            "context": context,
            "ms_per_step": time,
            "ceiling_share": share,
        }

    times = [step("one row", 1, 1.1), step("rows", 4, 2.0), step("rows", 1, 1.2)]
    times.append(step("rows", 4, 5.0, context=1024))
    ours = {"device": "NVIDIA H200, 132 SMs", "results": [{"model": "pythia-2.8b", "times": times}]}
    (folder / "rows_h200.json").write_text(json.dumps(ours))
    picture = ElementTree.fromstring(plot.pictures(folder)["rows_h200.svg"])
    assert len(circles(picture, "c0")) == 2 and len(circles(picture, "c1")) == 1
    assert not circles(picture, "c2"), "no rival is recorded"

    rival = {"name": "Other", "date": "2026-01-02", "times": [{"rows": 1, "ms_per_step": 2.4}]}
    rival["times"].append({"rows": 4, "ms_per_step": 4.0})
    (folder / "rows_vllm_h200.json").write_text(json.dumps(rival))
    picture = ElementTree.fromstring(plot.pictures(folder)["rows_h200.svg"])
    labels = [element.text for element in picture.iter(f"{SVG}text")]
    assert "Other" in labels and "recorded 2026-01-02" in labels
    (one, four), (others, _) = circles(picture, "c0"), circles(picture, "c2")
    heights = tick_heights(picture)
    octave = heights["1"] - heights["2"]
    assert one[1] - others[1] == pytest.approx(octave, abs=0.2), "twice the time"
    assert one[1] - four[1] == pytest.approx(octave * 0.737, abs=0.2), "log2(2 / 1.2)"
    (floor,) = (p for p in picture.iter(f"{SVG}path") if p.get("class") == "floor")
    low, high = (float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", floor.get("d")))
    assert low - one[1] == pytest.approx(octave * 0.152, abs=0.2), "nine tenths of the time"
    assert high - four[1] == pytest.approx(octave, abs=0.2), "half of it"


def test_ceiling_share_has_a_line_for_each_chip(folder):
    picture = ElementTree.fromstring(plot.pictures(folder)["ceiling_share.svg"])
    labels = [element.text for element in picture.iter(f"{SVG}text")]
    assert labels.index("14m") < labels.index("2.8b") < labels.index("12b")
    assert {"H100", "H200"} <= set(labels)
    ticks = tick_heights(picture)
    unit = (ticks["0 %"] - ticks["100 %"]) / 100
    for style, share in (("c0", 94), ("c1", 91)):
        for _, height in circles(picture, style):
            assert (ticks["0 %"] - 4 - height) / unit == pytest.approx(share, abs=0.1)


def test_labels_do_not_meet(folder):
    for picture in plot.pictures(folder).values():
        places = [
            (float(element.get("x")), float(element.get("y")))
            for element in ElementTree.fromstring(picture).iter(f"{SVG}text")
            if float(element.get("x")) > plot.WIDTH - plot.RIGHT
        ]
        heights = sorted(y for _, y in places)
        assert all(b - a >= plot.LABEL_LINE - 0.1 for a, b in itertools.pairwise(heights))
        assert heights[0] > 0 and heights[-1] < plot.HEIGHT


def test_plot_checks_what_it_wrote(folder, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    command = ["plot", "--results", str(folder), "--output", str(images)]
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert plot.main() == 1
    assert "decode_time_h100.svg is out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    assert plot.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert plot.main() == 0
    file = images / "ceiling_share.svg"
    file.write_text(file.read_text() + " ")
    assert plot.main() == 1


def test_nothing_is_drawn_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["plot", "--results", str(tmp_path), "--output", str(tmp_path)]
    )
    assert plot.main() == 0
    assert list(tmp_path.iterdir()) == []
    assert update_readme.gpu_tables({}) == []


def test_readme_tables(results):
    compared, on_h200, sizes = update_readme.gpu_tables(results)
    lines = [line.strip("| ").split(" | ") for line in compared.splitlines() if line[:1] == "|"]
    head, _, ours, graph, eager, compiled, faster, share = lines
    assert head == ["pythia-2.8b, ms a token", *(f"context {c}" for c in (16, 128, 1024, 2047))]
    assert ours[:2] == ["**ClusterFusion**", "1.700 (1.683 to 1.734)"]
    assert graph[1] == "4.200 (4.158 to 4.284)"
    assert eager[1] == "60.0 (59.4 to 61.2)"
    assert compiled[1:] == ["TimeoutError: not done"] * 4
    assert faster[1:] == ["2.47"] * 4, "4.2 / 1.7"
    assert share[1:] == ["95.0 %", "94.0 %", "93.0 %", "92.0 %"]
    assert "docs/images/decode_time_h100.svg" in compared and "3.20 TB/s" in compared
    assert "| H200, share of the read ceiling | 91 % | 91 % | 91 % |" in sizes
    assert "docs/images/ceiling_share.svg" in sizes

    assert on_h200.startswith("GPU, NVIDIA H200, driver 580.1: the same. ")
    assert "docs/images/decode_time_h200.svg" in on_h200
    (_, _, ours, share) = (line for line in on_h200.splitlines() if line[:1] == "|")
    assert ours.startswith("| **ClusterFusion** | 1.700 (1.683 to 1.734) |")
    assert share == "| share of the read ceiling | 92.0 % | 91.0 % | 90.0 % | 89.0 % |"
