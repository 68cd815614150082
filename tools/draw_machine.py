#!/usr/bin/env python3
"""Draw the streaming machine that docs/architecture.md explains: docs/images/streaming_machine.svg.

draw_machine.py           write it
draw_machine.py --check   exit with 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "streaming_machine.svg"
WIDTH, HEIGHT = 980, 700

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; }
.title { font-size: 15px; font-weight: 600; text-anchor: start; }
.name { font-weight: 600; }
.note { font-size: 11px; fill: #59636e; }
.left { text-anchor: start; }
rect { fill: #f6f8fa; stroke: #59636e; rx: 6px; }
rect.block { fill: none; stroke-dasharray: 6 4; }
rect.scheduler { fill: #ddf4ff; stroke: #0969da; }
rect.copy { fill: #fff1e5; stroke: #bc4c00; }
rect.compute { fill: #dafbe1; stroke: #1a7f37; }
rect.buffer { fill: #fbefff; stroke: #8250df; }
line { stroke: #59636e; stroke-width: 1.5; marker-end: url(#tip); }
line.publish, path.publish { stroke: #8250df; stroke-width: 1.5; fill: none; }
path { marker-end: url(#tip); }
marker path { fill: #59636e; marker-end: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; } .note { fill: #9198a1; }
  rect { fill: #151b23; stroke: #9198a1; }
  rect.scheduler { fill: #0c2d4a; stroke: #4493f8; }
  rect.copy { fill: #3d2000; stroke: #f0883e; }
  rect.compute { fill: #0f3019; stroke: #3fb950; }
  rect.buffer { fill: #2b1a47; stroke: #ab7df8; }
  line { stroke: #9198a1; } marker path { fill: #9198a1; }
  line.publish, path.publish { stroke: #ab7df8; }
}
"""


class Drawing:
    """Shapes of an SVG, one a line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """One line of text, centred at x unless `kind` says left or title."""
        self.lines.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def box(self, place: tuple[float, float, float, float], kind: str, *texts: str) -> None:
        """A rectangle (x, y, width, height) with a name and notes under it."""
        x, y, width, height = place
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'
        )
        top = y + height / 2 + 4.5 - 8 * (len(texts) - 1)
        for i, text in enumerate(texts):
            self.text(x + width / 2, top + 16 * i, text, "note" if i else "name")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, kind: str = "") -> None:
        """A straight arrow."""
        place = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
        self.lines.append(f'<line {place} class="{kind}"/>')

    def arc(self, x1: float, x2: float, y: float, depth: float) -> None:
        """An arrow from x1 to x2 below y: a result that crosses."""
        bend = y + depth
        path = f"M{x1:g},{y:g} C{x1:g},{bend:g} {x2:g},{bend:g} {x2:g},{y + 3:g}"
        self.lines.append(f'<path d="{path}" class="publish"/>')

    def svg(self) -> str:
        """The whole picture."""
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        title = "<title>The streaming machine: roles of warps, ring, Lamport buffers</title>"
        parts = [head, title, f"<style>{STYLE}</style>", tip, *self.lines, "</svg>"]
        return "\n".join(parts) + "\n"


def draw_block(d: Drawing) -> None:
    """One block of threads: its warps and its ring."""
    d.text(20, 28, "One block on each SM, for up to 16 steps", "title")
    d.box((20, 110, 130, 190), "copy", "memory", "weights, as in", "the checkpoint", "KV pages")
    d.box((180, 46, 560, 376), "block")
    d.box(
        (200, 62, 210, 70),
        "scheduler",
        "work scheduler (1 thread)",
        "which chunk comes next:",
        "static, then by ticket",
    )
    d.box((200, 158, 210, 56), "copy", "producer (1 thread)", "starts bulk copies")
    d.box(
        (470, 62, 250, 152),
        "compute",
        "8 consumer warps",
        "products on tensor cores",
        "attention, LayerNorm, residual stream",
        "activations stay in registers",
    )
    draw_ring(d)
    d.box((470, 326, 250, 40), "compute", "4 reducer warps", "1 to 16 rows: sums, epilogue")
    d.box((200, 326, 210, 40), "compute", "split combiner (1 warp)", "merges splits of attention")
    d.box(
        (470, 372, 250, 42), "buffer", "buffer clearer (1 warp)", "fills old sets with the sentinel"
    )
    d.arrow(305, 132, 305, 157)
    d.arrow(150, 186, 199, 186)
    d.arrow(305, 214, 305, 245)
    d.arrow(595, 245, 595, 216)
    d.text(620, 235, "wait full", "note left")
    d.text(315, 150, "announce", "note left")


def draw_ring(d: Drawing) -> None:
    """The ring, with stages in each of their states."""
    states = ["landed"] * 6 + ["in flight"] * 2 + ["announced"] + ["empty"]
    kinds = {"landed": "compute", "in flight": "copy", "announced": "scheduler", "empty": ""}
    width = 50
    for i, state in enumerate(reversed(states)):
        d.box((205 + i * (width + 1.5), 247, width, 34), kinds[state])
    d.text(226, 298, "empty", "note")
    d.text(282, 298, "announced", "note")
    d.text(362, 298, "in flight", "note")
    d.text(565, 298, "landed: read, then released", "note")
    d.text(460, 316, "ring in shared memory (Pythia-2.8B: 10 stages of 20 KB)", "name")


def draw_buffers(d: Drawing) -> None:
    """The Lamport buffers, through which blocks exchange results."""
    d.box((790, 46, 170, 376), "block")
    d.text(875, 72, "Lamport buffers", "name")
    d.text(875, 90, "in L2, of all blocks", "note")
    d.box(
        (805, 104, 140, 62),
        "buffer",
        "set of epoch e",
        "QKV, MLP, attention,",
        "updates, candidates",
    )
    d.box((805, 184, 140, 46), "buffer", "set of e + 1", "clear")
    d.box((805, 340, 140, 62), "buffer", "set of e - 1", "cleared when all", "have begun epoch e")
    d.text(875, 258, "an element that is all", "note")
    d.text(875, 274, "ones is not ready:", "note")
    d.text(875, 290, "load it again", "note")
    d.arrow(720, 110, 804, 118, "publish")
    d.text(765, 104, "publish", "note")
    d.arrow(804, 150, 722, 142, "publish")
    d.text(765, 162, "await", "note")
    d.arrow(720, 340, 812, 167, "publish")
    d.arrow(720, 393, 804, 384, "publish")


def draw_layer(d: Drawing) -> None:
    """What streams for one layer, and which results it waits for."""
    d.text(20, 462, "The stream of one layer with parallel residual (one epoch)", "title")
    parts = [
        ("QKV", "copy", 130),
        ("MLP up", "copy", 190),
        ("attention", "buffer", 90),
        ("MLP down", "copy", 190),
        ("attention out", "copy", 110),
        ("next layer", "", 120),
    ]
    x, places = 40.0, []
    for name, kind, width in parts:
        d.box((x, 490, width, 40), kind, name)
        places.append((x, width))
        x += width + 6
    centre = [left + width / 2 for left, width in places]
    d.text(places[0][0] + 160, 482, "phase 1: both matrices are scheduled together", "note")
    d.text(places[2][0] + 210, 482, "phase 2, with each SM's attention in front", "note")
    d.arc(centre[0], centre[2], 530, 60)
    d.arc(centre[1], centre[3] - 40, 530, 60)
    d.arc(centre[2] + 20, centre[4], 530, 90)
    d.arc(centre[3], centre[5], 530, 120)
    d.arc(centre[4] + 20, centre[5] + 30, 530, 90)
    d.text(
        490, 650, "Arrows: results that cross in Lamport buffers. The stream itself waits", "note"
    )
    d.text(490, 666, "for none of them: while consumers wait, the ring fills.", "note")


def picture() -> str:
    """The text of the SVG file."""
    d = Drawing()
    draw_block(d)
    draw_buffers(d)
    draw_layer(d)
    return d.svg()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    new = picture()
    if not parser.parse_args().check:
        PICTURE.write_text(new, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != new:
        print(f"{PICTURE.name} is out of date: run tools/draw_machine.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
