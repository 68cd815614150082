"""The tables of docs/speculation.md, from what benchmarks/speculation_texts.py wrote."""

from __future__ import annotations

from typing import Any

from markdown_parts import table

Result = dict[str, Any]


def theory_table(result: Result | None) -> str:
    """Time a token with a draft of known quality, beside the cost of a step over its tokens."""
    if result is None or "theory" not in result:
        return ""
    theory = result["theory"]
    lines = [
        [
            "right",
            "proposed a step",
            "tokens a step",
            "ms a step",
            "ms a token",
            "over theory",
            "speed-up",
        ]
    ]
    for row in theory["rows"]:
        lines.append(
            [
                f"{100 * row['share_right']:.0f} %",
                str(row["proposals"]),
                f"{row['tokens_a_step']:.2f}",
                f"{1e3 * row['step_seconds_all_rows']:.3f}",
                f"{1e3 * row['token_seconds']:.3f}",
                f"{100 * row['over_theory']:+.1f} %",
                f"{row['speedup']:.2f}",
            ]
        )
    plain = 1e3 * theory["rows"][0]["token_seconds_plain"]
    return (
        f"{theory['model']} with random weights, {result['device']}: a draft that knows the text "
        f"and says a share of the tokens right. Theory: a step's time over the tokens that it "
        f"gives. Without a draft a token takes {plain:.3f} ms.\n\n" + table(lines)
    )


def temperature_label(temperature: float) -> str:
    """How a text was drawn."""
    return "greedy" if temperature == 0 else f"{temperature:g}"


def texts_table(result: Result | None) -> str:
    """What drafts gained on texts: the median over the prompts, the least and the greatest."""
    if result is None:
        return ""
    lines = [["text", "draft", "drawn", "speed-up", "of which right", "accepted a step", "steps"]]
    for row in result["texts"]:
        if row["draft"] == "none":
            continue
        gained = row["speedup"]
        has_proposed = row["acceptance"] is not None
        lines.append(
            [
                row["kind"],
                row["draft"],
                temperature_label(row["temperature"]),
                f"{gained['median']:.2f} ({gained['low']:.2f} to {gained['high']:.2f})",
                f"{100 * row['acceptance']:.0f} % of {row['proposed']}" if has_proposed else "",
                f"{row['mean_accepted']:.2f}" if has_proposed else "",
                str(row["decode_steps"]),
            ]
        )
    texts = max(row["texts"] for row in result["texts"])
    return (
        f"{result['target']}, {result['device']}: {texts} texts of a kind, {result['tokens']} "
        "tokens each; the median of the speed-ups, the least and the greatest.\n\n" + table(lines)
    )


def computed_table(result: Result | None) -> str:
    """What a larger target would gain."""
    if result is None or "computed" not in result:
        return ""
    computed = result["computed"]
    lines = [["text", "draft", "drawn", "proposed a step", "tokens a step", "speed-up"]]
    for row in computed["rows"]:
        lines.append(
            [
                row["kind"],
                row["draft"],
                temperature_label(row["temperature"]),
                str(row["proposals"]),
                f"{row['tokens_a_step']:.2f}",
                f"{row['speedup']:.2f}",
            ]
        )
    return (
        f"**Computed, not measured**: {computed['model']} with a draft that costs as much as "
        f"{computed['draft_model']}, whose steps were timed in the same run with random weights, "
        "at the tokens a step that the trained pair gave with the best fixed number of "
        "proposals.\n\n" + table(lines)
    )
