"""What benchmarks/speculation_texts.py computes from what was measured."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from speculation_prompts import continuation, copy_with_edit, extracts, passages  # noqa: E402
from speculation_texts import NGRAM_SECONDS, gains_of_larger_target, label, line  # noqa: E402

COSTS = {
    "plain_seconds": 3e-3,
    "plain_seconds_latency": 2.9e-3,
    "step_seconds": [{"rows": 1, "seconds": 3.1e-3}, {"rows": 9, "seconds": 3.9e-3}],
    "draft_seconds": [{"tokens": 1, "seconds": 1e-4}, {"tokens": 16, "seconds": 16e-4}],
}


def acceptance(draft: str, proposals: int, tokens: int, steps: int) -> dict:
    row = {"kind": "extracts", "temperature": 0.8, "draft": draft, "proposals": proposals}
    return row | {"tokens": tokens, "steps": steps, "proposed": 10, "accepted": tokens - steps}


def test_costs_between_measured_points():
    assert line(COSTS["step_seconds"], "rows", 1) == 3.1e-3
    assert line(COSTS["step_seconds"], "rows", 5) == pytest.approx(3.5e-3)
    with pytest.raises(SystemExit, match="expected a cost of 10 rows"):
        line(COSTS["step_seconds"], "rows", 10)


def test_gain_with_the_best_number_of_proposals():
    rows = [
        acceptance("draft", 4, 300, 100),  # 3 tokens in 3.5 + 0.4 + 0.1 ms
        acceptance("draft", 8, 310, 100),
        acceptance("ngram", 4, 150, 100),
    ]
    by_draft, by_ngram = gains_of_larger_target(COSTS, rows)
    assert by_draft["proposals"] == 4
    assert by_draft["token_seconds"] == pytest.approx(4e-3 / 3)
    assert by_draft["speedup"] == pytest.approx(2.25)
    assert by_draft["speedup_over_latency"] == pytest.approx(2.175)
    assert by_ngram["token_seconds"] == pytest.approx((3.5e-3 + NGRAM_SECONDS) / 1.5)


def test_names_of_drafts():
    assert [label(name) for name in ("ngram", "none, mode latency", "a/b")] == [
        "ngram",
        "none, mode latency",
        "b",
    ]


def test_prompts_hold_their_passages():
    paragraph = "One went home. Another stayed for a considerably longer time. " * 4
    [passage] = passages("\n\n".join([paragraph.strip()] * 9), 1)
    whole = "\n\n".join(passage)
    assert whole.startswith(continuation(passage)) and len(continuation(passage)) < len(whole)
    assert copy_with_edit(passage).startswith(
        whole + "\n\nOne went home. Another stayed for a window"
    )
    assert extracts(passage).removeprefix(whole).startswith("\n\nOne went home. ")
