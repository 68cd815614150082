"""What drafts gain on texts: time a token without a draft and with some, through the Python API.

    python benchmarks/speculation_texts.py TARGET --drafts ngram,DRAFT,models/demo [--device cuda]
        [--tokens 128] [--rounds 3] [--per-kind 8] [--measured speculation_time.json]
        [--about "commit ..., driver ..."] [--output benchmarks/results/speculation_h200.json]

Each prompt of speculation_texts.json (speculation_prompts.py) is continued greedily and at
temperature 0.8 by one engine for each draft, in turns; a text that differs from the one without a
draft ends the program. A speed-up is that of a prompt, of medians over the rounds; the median, the
least and the greatest over the prompts of a kind are given. Times a token are the engine's, drafts
included; "whole" times are a caller's, from the call to the last token, prompts included. On a GPU
engines run in mode throughput; a plain one in mode latency stands beside them, whose texts may
differ.

With --measured, what benchmarks/cuda/speculation_time.cpp printed, the result has its theory and
costs, and what a larger target would gain is computed: measured tokens a step, with a fixed number
of proposals, over the measured time of such a step and of as many steps of a draft of another
shape, and one more that reads what the target chose. The best number is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import clusterfusion

HERE = Path(__file__).resolve().parent
NONE, LATENCY = "none", "none, mode latency"
TEMPERATURES = (0.0, 0.8)
# Of one step of the n-gram draft, at most (speculation_cpu.json has it by length).
NGRAM_SECONDS = 2e-6


@dataclass
class Times:
    """Of one prompt by one engine, over the rounds, and what its draft did."""

    token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    last: clusterfusion.Generation | None = None


def label(draft: str) -> str:
    """A draft for readers: a folder without those above it."""
    return Path(draft).name if "/" in draft else draft


def open_engines(options: argparse.Namespace) -> dict[str, clusterfusion.Engine]:
    """One for each draft, by its name."""
    common: dict[str, Any] = {"device": options.device, "prefix_cache": False}
    common["threads"] = options.threads
    drafts = {NONE: None} | {draft: draft for draft in options.drafts.split(",")}
    engines = {
        name: clusterfusion.Engine(options.target, mode="throughput", draft=draft, **common)
        for name, draft in drafts.items()
    }
    if options.device == "cuda":
        engines[LATENCY] = clusterfusion.Engine(options.target, **common)
    return engines


def time_prompt(
    engines: dict[str, clusterfusion.Engine], prompt: str, rounds: int, **request: Any
) -> dict[str, Times]:
    """All engines in turns."""
    times = {name: Times() for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            begin = time.perf_counter()
            result = engine.generate(prompt, ignore_eos=True, **request)
            times[name].whole.append(time.perf_counter() - begin)
            times[name].token.append(result.statistics.seconds_per_token)
            times[name].last = result
            if name != LATENCY and result.tokens != times[NONE].last.tokens:
                raise SystemExit(f"draft {name} changed the text of {prompt!r}")
    return times


def row_of(kind: str, temperature: float, name: str, prompts: list[dict[str, Times]]) -> dict:
    """What the prompts of a kind say of a draft."""

    def speedups(part: str) -> dict[str, float]:
        each = sorted(
            statistics.median(getattr(times[NONE], part))
            / statistics.median(getattr(times[name], part))
            for times in prompts
        )
        return {"median": statistics.median(each), "low": each[0], "high": each[-1]}

    counts = [times[name].last.statistics for times in prompts]
    proposed = sum(count.draft_proposed for count in counts)
    accepted = sum(count.draft_accepted for count in counts)
    draft_steps = sum(count.draft_steps for count in counts)
    return {
        "kind": kind,
        "temperature": temperature,
        "draft": label(name),
        "texts": len(prompts),
        "token_seconds": statistics.median(
            statistics.median(times[name].token) for times in prompts
        ),
        "speedup": speedups("token"),
        "whole_speedup": speedups("whole"),
        "decode_steps": sum(count.decode_steps for count in counts),
        "draft_steps": draft_steps,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance": accepted / proposed if proposed else None,
        "mean_accepted": accepted / draft_steps if draft_steps else None,
    }


def measure(
    engines: dict[str, clusterfusion.Engine], options: argparse.Namespace
) -> Iterator[dict]:
    """Rows by kind, temperature and draft."""
    prompts = json.loads(Path(options.prompts).read_text(encoding="utf-8"))
    for engine in engines.values():  # not timed
        engine.generate(prompts[0]["prompt"], max_new_tokens=64, ignore_eos=True)
    for kind in dict.fromkeys(prompt["kind"] for prompt in prompts):
        texts = [prompt["prompt"] for prompt in prompts if prompt["kind"] == kind]
        for temperature in TEMPERATURES:
            times = [
                time_prompt(
                    engines,
                    text,
                    options.rounds,
                    max_new_tokens=options.tokens + 1,
                    temperature=temperature,
                    seed=seed,
                )
                for seed, text in enumerate(texts[: options.per_kind])
            ]
            for name in engines:
                yield row_of(kind, temperature, name, times)


def line(points: list[dict[str, float]], x: str, at: int) -> float:
    """Seconds at x, between measured points on a line."""
    known = sorted((point[x], point["seconds"]) for point in points)
    for (low, below), (high, above) in pairwise(known):
        if low <= at <= high:
            return below + (above - below) * (at - low) / (high - low)
    raise SystemExit(f"expected a cost of {at} {x}, found {known}")


def gains_of_larger_target(costs: dict, acceptance: list[dict]) -> list[dict]:
    """For each kind, temperature and draft the best number of proposals, and its speed-up."""
    best: dict[tuple, dict] = {}
    for row in acceptance:
        k = row["proposals"]
        draft = NGRAM_SECONDS
        if row["draft"] != "ngram":
            draft = sum(line(costs["draft_seconds"], "tokens", count) for count in (k, 1))
        tokens_a_step = row["tokens"] / row["steps"]
        seconds = (line(costs["step_seconds"], "rows", k + 1) + draft) / tokens_a_step
        key = (row["kind"], row["temperature"], row["draft"])
        gain = {
            "kind": row["kind"],
            "temperature": row["temperature"],
            "draft": row["draft"],
            "proposals": k,
            "tokens_a_step": tokens_a_step,
            "acceptance": row["accepted"] / row["proposed"] if row["proposed"] else None,
            "token_seconds": seconds,
            "speedup": costs["plain_seconds"] / seconds,
            "speedup_over_latency": costs["plain_seconds_latency"] / seconds,
        }
        if key not in best or gain["speedup"] > best[key]["speedup"]:
            best[key] = gain
    return list(best.values())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="TARGET", help="checkpoint folder")
    parser.add_argument("--drafts", default="ngram", help="names and folders, with commas")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all cores")
    parser.add_argument("--prompts", default=HERE / "speculation_texts.json")
    parser.add_argument("--per-kind", type=int, default=8, help="prompts of each kind at most")
    parser.add_argument("--tokens", type=int, default=128, help="of each text, but the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=[], help="what speculation_time printed"
    )
    parser.add_argument("--pair", type=Path, help="pair.json of tools/train_draft_pair.py")
    parser.add_argument("--about", default="", help="commit, driver, command")
    parser.add_argument("--output", type=Path, help="instead of standard output")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = parse_arguments()
    engines = open_engines(options)
    result: dict[str, Any] = {
        "what": "time a token with and without drafts; see benchmarks/speculation_texts.py",
        "about": options.about,
        "device": engines[NONE].info.device_description,
        "target": label(options.target),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "texts": list(measure(engines, options)),
    }
    if options.pair:
        result["pair"] = json.loads(options.pair.read_text(encoding="utf-8"))
    for path in options.measured:
        result |= json.loads(path.read_text(encoding="utf-8"))
    for row in result.get("acceptance", {}).get("rows", []):
        row["draft"] = label(row["draft"])
    if "costs" in result and "acceptance" in result:
        result["computed"] = {
            "what": "computed, not measured: what a target of the costs' shape would gain at the "
            "acceptance of the trained pair",
            "model": result["costs"]["model"],
            "draft_model": result["costs"]["draft_model"],
            "rows": gains_of_larger_target(result["costs"], result["acceptance"]["rows"]),
        }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
