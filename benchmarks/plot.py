#!/usr/bin/env python3
"""Draw the GPU's results as the SVG files that README.md and docs/*.md show.

plot.py            write docs/images: decode_time_*.svg and ceiling_share.svg from gpu_*.json in
                   benchmarks/results, layer_ablation.svg from ablation_h100.json,
                   rows_h200.svg from rows_*h200.json, serving_*_h200.svg from serving_*_h200.json
plot.py --check    exit with 1 if they are not what would be written

Plain SVG, readable on light and dark pages. Without results there is nothing to draw.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gpu_results import (
    COMPARED,
    RESULTS,
    Result,
    contexts_of,
    decode_time_picture,
    floor_of,
    load_results,
    load_rows,
    load_serving,
    serving_pictures,
    short_contexts,
)

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 220, 64, 48  # margins; labels of the lines stand on the right
LABEL_LINE = 16

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.muted { fill: #59636e; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
path, circle { stroke-width: 2; }
path { fill: none; }
.c0 { stroke: #0969da; } circle.c0, text.c0 { fill: #0969da; } path.c0 { stroke-width: 3; }
.c1 { stroke: #bc4c00; } circle.c1, text.c1 { fill: #bc4c00; }
.c2 { stroke: #8250df; } circle.c2, text.c2 { fill: #8250df; }
.c3 { stroke: #1a7f37; } circle.c3, text.c3 { fill: #1a7f37; }
.c4 { stroke: #bf3989; } circle.c4, text.c4 { fill: #bf3989; }
.c5 { stroke: #9a6700; } circle.c5, text.c5 { fill: #9a6700; }
.floor { stroke: #59636e; stroke-dasharray: 5 4; } text.floor { fill: #59636e; }
text[class] { stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; } .muted { fill: #9198a1; } .grid { stroke: #3d444d; }
  .c0 { stroke: #4493f8; } circle.c0, text.c0 { fill: #4493f8; }
  .c1 { stroke: #f0883e; } circle.c1, text.c1 { fill: #f0883e; }
  .c2 { stroke: #ab7df8; } circle.c2, text.c2 { fill: #ab7df8; }
  .c3 { stroke: #3fb950; } circle.c3, text.c3 { fill: #3fb950; }
  .c4 { stroke: #db61a2; } circle.c4, text.c4 { fill: #db61a2; }
  .c5 { stroke: #d29922; } circle.c5, text.c5 { fill: #d29922; }
  .floor { stroke: #9198a1; } text.floor { fill: #9198a1; }
}
""".strip()


@dataclass(frozen=True)
class Line:
    """A line through (x, y), both in data units, and its name in one or two lines of text."""

    name: str
    style: str
    points: list[tuple[float, float]]

    @property
    def label(self) -> list[str]:
        """The name, broken behind its first comma."""
        return self.name.split(", ", 1)


@dataclass(frozen=True)
class Axis:
    """A scale from data units to a stretch of the picture, with ticks and their texts."""

    low: float
    high: float
    begin: float
    end: float
    ticks: list[tuple[float, str]]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies in the picture."""
        measure = math.log if self.logarithmic else float
        share = (measure(value) - measure(self.low)) / (measure(self.high) - measure(self.low))
        return self.begin + share * (self.end - self.begin)


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """A text element."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def spread_out(wanted: list[float], sizes: list[int]) -> list[float]:
    """Heights near the wanted ones, in their order, at which labels of these sizes do not meet."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    free = -math.inf
    for i in order:
        placed[i] = max(wanted[i], free)
        free = placed[i] + sizes[i]
    # What was pushed out at the bottom comes back, and pushes the others up.
    free = HEIGHT - BOTTOM + LABEL_LINE
    for i in reversed(order):
        placed[i] = min(placed[i], free - sizes[i])
        free = placed[i]
    return placed


def chart(title: str, subtitle: str, x: Axis, y: Axis, lines: list[Line], x_name: str) -> str:
    """The picture."""
    right = WIDTH - RIGHT
    parts = [text(LEFT - 40, 24, title, "title"), text(LEFT - 40, 44, subtitle, "muted")]
    for value, label in y.ticks:
        height = y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" y1="{height:.1f}" x2="{right}" y2="{height:.1f}"/>'
        )
        parts.append(text(LEFT - 8, height + 4, label, "muted", "end"))
    for value, label in x.ticks:
        parts.append(text(x(value), HEIGHT - BOTTOM + 20, label, "muted", "middle"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 8, x_name, "muted", "middle"))
    heights = spread_out(
        [y(line.points[-1][1]) + 4 - (len(line.label) - 1) * LABEL_LINE / 2 for line in lines],
        [LABEL_LINE * len(line.label) + 2 for line in lines],
    )
    for line, height in zip(lines, heights, strict=True):
        places = [(f"{x(a):.1f}", f"{y(b):.1f}") for a, b in line.points]
        parts.append(f'<path class="{line.style}" d="M{" L".join(map(" ".join, places))}"/>')
        if line.style != "floor":
            parts += [f'<circle class="{line.style}" cx="{a}" cy="{b}" r="3"/>' for a, b in places]
        for row, words in enumerate(line.label):
            style = "muted" if row else line.style
            parts.append(text(right + 12, height + row * LABEL_LINE, words, style))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n<style>\n{STYLE}\n</style>\n{body}\n</svg>\n'
    )


def decode_time(chip: str, result: Result) -> str:
    """Time a token against the context, with the floor and the rivals."""
    ours = contexts_of(result)
    lines = [
        Line(rival["name"], f"c{1 + i % 4}", points_of(rival["contexts"]))
        for i, rival in enumerate(result["rivals"])
        if rival["contexts"]
    ]
    lines.append(Line("ClusterFusion", "c0", points_of(ours)))
    lines.append(
        Line("floor: memory's speed", "floor", [(r["context"], floor_of(r)) for r in ours])
    )
    values = [value for line in lines for _, value in line.points]
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)]
    low = max(t for t in ticks if t <= min(values))
    high = min((t for t in ticks if t >= max(values)), default=ticks[-1])
    shown = [(t, f"{t:g}") for t in ticks if low <= t <= high]
    return chart(
        f"{COMPARED.capitalize()}: milliseconds a token",
        f"{chip}, float16, batch 1, greedy, whole step; less is better (logarithmic)",
        context_axis(lines),
        Axis(low, high, HEIGHT - BOTTOM, TOP, shown, logarithmic=True),
        lines,
        "context, tokens",
    )


def context_axis(lines: list[Line]) -> Axis:
    """An axis for all contexts of these lines."""
    longest = 512 * math.ceil(max(context for line in lines for context, _ in line.points) / 512)
    return Axis(0, longest, LEFT, WIDTH - RIGHT, [(t, f"{t}") for t in range(0, longest + 1, 512)])


def points_of(contexts: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Times by context."""
    return sorted((row["context"], row["ms_per_token"]) for row in contexts)


def ceiling_share(results: dict[str, Result]) -> str:
    """Share of the read ceiling by model, a line for each chip."""
    names: list[str] = []
    lines = []
    for i, (chip, result) in enumerate(results.items()):
        points = []
        for name, row in short_contexts(result):
            if name not in names:
                names.append(name)
            points.append((names.index(name), 100 * row["ceiling_share"]))
        lines.append(Line(chip, f"c{i}", sorted(points)))
    return chart(
        "Share of the memory's read ceiling, by model",
        "float16, batch 1, greedy, context 128; more is better, 100 % is the floor's speed",
        Axis(
            -0.5,
            len(names) - 0.5,
            LEFT,
            WIDTH - RIGHT,
            [(i, name.removeprefix("pythia-")) for i, name in enumerate(names)],
        ),
        Axis(0, 100, HEIGHT - BOTTOM, TOP, [(t, f"{t} %") for t in range(0, 101, 20)]),
        lines,
        "Pythia size",
    )


def layer_ablation(result: Result) -> str:
    """Time a token over all layers against the position, a line for each way to compute them."""
    rows = [row for row in result["results"] if row["mode"] == "graph"]
    variants = dict.fromkeys(row["variant"] for row in rows)
    others = (f"c{i}" for i in range(1, len(variants)))
    lines = [
        Line(
            name,
            "c0" if name == "fused" else next(others),
            sorted(
                (row["position"], 1e3 * row["seconds_per_token"])
                for row in rows
                if row["variant"] == name
            ),
        )
        for name in variants
    ]
    floor = {
        row["position"]: 1e3 * row["seconds_per_token"] * row["share_of_ceiling"] for row in rows
    }
    lines.append(Line("floor: memory's speed", "floor", sorted(floor.items())))
    highest = math.ceil(max(value for line in lines for _, value in line.points))
    return chart(
        f"{result['layers']} layers of {result['model']}: milliseconds a token",
        f"{result['machine']['device']}, {result['dtype']}, CUDA graphs; less is better",
        context_axis(lines),
        Axis(0, highest, HEIGHT - BOTTOM, TOP, [(t, f"{t}") for t in range(highest + 1)]),
        lines,
        "positions in the cache",
    )


def serving_time(measure: str, title: str, result: Result, rival: Result | None) -> str:
    """A time of the server's against the number of its clients, beside the engine and a rival."""
    ours = result["rows"]

    def medians(side: str) -> list[tuple[float, float]]:
        return [(row["clients"], row[side][measure]["median"]) for row in ours]

    lines = [
        Line("ClusterFusion's server", "c0", medians("server")),
        Line("the engine alone", "c1", medians("engine")),
    ]
    if rival:
        points = [(row["clients"], row[measure]) for row in rival["rows"]]
        lines.append(Line(f"{rival['name']}, recorded {rival['date']}", "c2", points))
    return logarithmic_chart(
        f"{result['model']}: {title}",
        f"{result['device'].split(',')[0]}, streams of {result['prompt_tokens']} + "
        f"{result['new_tokens']} tokens, medians; less is better (both axes logarithmic)",
        lines,
        "clients at once",
    )


def logarithmic_chart(title: str, subtitle: str, lines: list[Line], x_name: str) -> str:
    """The picture of times against numbers of something, both on logarithmic axes."""
    numbers = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points]
    ticks = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    low = max(tick for tick in ticks if tick <= min(values))
    high = min(tick for tick in ticks if tick >= max(values) and tick > low)
    shown = [(tick, f"{tick:g}") for tick in ticks if low <= tick <= high]
    return chart(
        title,
        subtitle,
        Axis(
            numbers[0],
            max(numbers[-1], numbers[0] + 1),
            LEFT,
            WIDTH - RIGHT,
            [(number, f"{number:g}") for number in numbers],
            logarithmic=True,
        ),
        Axis(low, high, HEIGHT - BOTTOM, TOP, shown, logarithmic=True),
        lines,
        x_name,
    )


def rows_time(result: Result, rival: Result | None) -> str:
    """Time a step against the sequences in it, with what reading takes and a rival."""
    [model] = [model for model in result["results"] if model["model"] == COMPARED]
    short = [time for time in model["times"] if time["context"] == 128]
    together = sorted(
        (time for time in short if time["kernel"] == "rows"), key=lambda time: time["rows"]
    )
    [alone] = [time for time in short if time["kernel"] == "one row"]
    lines = [
        Line(
            "ClusterFusion, mode throughput",
            "c0",
            [(time["rows"], time["ms_per_step"]) for time in together],
        ),
        Line("mode latency, one sequence", "c1", [(1, alone["ms_per_step"])]),
        Line(
            "floor, what a step reads at the ceiling",
            "floor",
            [(time["rows"], time["ms_per_step"] * time["ceiling_share"]) for time in together],
        ),
    ]
    if rival:
        points = [(time["rows"], time["ms_per_step"]) for time in rival["times"]]
        lines.append(Line(f"{rival['name']}, recorded {rival['date']}", "c2", points))
    return logarithmic_chart(
        f"{COMPARED}: milliseconds a step of several sequences",
        f"{result['device'].split(',')[0]}, each at about 128 positions, medians; less is better "
        "(both axes logarithmic)",
        lines,
        "sequences in a step",
    )


def pictures(folder: Path) -> dict[str, str]:
    """All that can be drawn of a folder of results, by file name."""
    results = load_results(folder)
    drawn = {
        decode_time_picture(chip): decode_time(chip, result)
        for chip, result in results.items()
        if contexts_of(result)
    }
    if results:
        drawn["ceiling_share.svg"] = ceiling_share(results)
    ablation = folder / "ablation_h100.json"
    if ablation.exists():
        drawn["layer_ablation.svg"] = layer_ablation(json.loads(ablation.read_text("utf-8")))
    rows = load_rows(folder)
    if rows:
        drawn["rows_h200.svg"] = rows_time(*rows)
    serving = load_serving(folder)
    if serving:
        for measure, (name, title) in serving_pictures().items():
            drawn[name] = serving_time(measure, title, *serving)
    return drawn


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    stale = 0
    for name, content in pictures(arguments.results).items():
        path = arguments.output / name
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != content:
                print(f"{path} is out of date: run benchmarks/plot.py", file=sys.stderr)
                stale = 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
