#!/usr/bin/env python3
"""Fill the README's generated parts: examples from examples/, tables from benchmarks/results/.

update_readme.py            rewrite them
update_readme.py --check    exit with 1 if README.md is not what would be written
update_readme.py --session  also run the demo (as `make generate` does) and record it
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def replace(text: str, begin: str, end: str, content: str) -> str:
    """Put `content` between the comments `begin` and `end`, each on a line of its own."""
    pattern = re.compile(
        rf"(<!-- {re.escape(begin)} -->\n).*?(<!-- {re.escape(end)} -->)", re.DOTALL
    )
    if not pattern.search(text):
        sys.exit(f"update_readme: README.md has no <!-- {begin} --> … <!-- {end} -->")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def include_examples(text: str) -> str:
    """Refresh each example that the README shows."""
    for language, name in re.findall(r"<!-- include (\w+) (\S+) -->", text):
        code = (ROOT / name).read_text(encoding="utf-8").rstrip()
        text = replace(
            text, f"include {language} {name}", "end include", f"```{language}\n{code}\n```\n"
        )
    return text


def load(name: str) -> dict[str, Any] | None:
    """One result file, or nothing."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cpu_table() -> str:
    """Decode and prefill on the CPU beside transformers."""
    result = load("cpu_410m.json")
    if result is None:
        return ""
    measured, ratios = result["measured"], result["ratios"]

    def spread(key: str, unit: float, digits: int) -> str:
        value = measured[key]
        median, low, high = (value[k] / unit for k in ("median", "smallest", "largest"))
        return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    machine, peer = result["machine"], result["transformers"]
    rows = [
        (
            "decode, ms a token",
            spread("decode_seconds", 1e-3, 1),
            f"bf16 {spread('transformers_bfloat16_decode_seconds', 1e-3, 1)}, "
            f"fp32 {spread('transformers_float32_decode_seconds', 1e-3, 1)}",
            f"{ratios['decode_speed_over_transformers_best']:.2f}",
        ),
        (
            "prefill of 512 tokens, s",
            spread("prefill_seconds", 1, 2),
            f"fp32 {spread('transformers_float32_prefill_seconds', 1, 2)}",
            f"{ratios['prefill_speed_over_transformers_float32']:.2f}",
        ),
    ]
    body = "".join(
        f"| {name} | {ours} | {theirs} | {ratio} |\n" for name, ours, theirs, ratio in rows
    )
    share = 100 * ratios["decode_share_of_plain_read"]
    return (
        f"CPU, {machine['backend']}: {result['what']}. Median (smallest to largest); "
        f"transformers {peer['transformers']}, torch {peer['torch']}.\n\n"
        "| | ClusterFusion | transformers | times as fast |\n|---|---|---|---|\n"
        f"{body}\nDecode reads the weights at {share:.0f} % of what a plain multi-threaded read of "
        "the same bytes reaches in the same run.\n"
    )


def memory_table() -> str:
    """Resident memory with a checkpoint of Pythia-2.8B's shape."""
    result = load("memory_2b8.json")
    if result is None:
        return ""
    weights, kv, peak, rest = (
        f"{value / 1e6:.0f} MB"
        for value in (
            result["weight_bytes"],
            result["kv_bytes"],
            result["ended"]["VmHWM"],
            result["allocated_bytes"],
        )
    )
    return (
        f"Memory: a random checkpoint of the shape of Pythia-2.8B ({weights} of weights, "
        f"mapped; {kv} of KV cache) peaks at {peak} resident, of which {rest} are neither.\n"
    )


def tokenizer_table() -> str:
    """The tokenizer beside Hugging Face tokenizers."""
    result = load("tokenizer.json")
    if result is None:
        return ""
    rows = "".join(
        f"| {case['name']} | {case['clusterfusion']['median_mb_per_s']:.1f} | "
        f"{case['tokenizers']['median_mb_per_s']:.2f} | {case['ratio_of_medians']:.1f} |\n"
        for case in result["cases"]
    )
    return (
        "Tokenizer, one thread, WikiText-2 with the GPT-NeoX tokenizer, median MB of text a second "
        f"(tokenizers {result['machine']['tokenizers']}):\n\n"
        "| | ClusterFusion | tokenizers | times as fast |\n|---|---|---|---|\n" + rows
    )


def record_session() -> str:
    """What `make generate` shows."""
    prompt = "It was a cold evening in November, and the old house"
    command = ["build/release/bin/clusterfusion", "generate", "models/demo", "--echo", "-p", prompt]
    command += ["--max-new-tokens", "120", "--temperature", "0.8", "--top-p", "0.95", "--seed", "1"]
    shown = " ".join(f'"{word}"' if " " in word else word for word in command)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return f"```console\n$ {shown}\n{done.stdout.rstrip()}\n{done.stderr.rstrip()}\n```\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--session", action="store_true", help="record the demo as well")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = include_examples(old)
    tables = [table for table in (cpu_table(), memory_table(), tokenizer_table()) if table]
    new = replace(new, "tables", "end tables", "\n".join(tables))
    if arguments.session:
        new = replace(new, "session", "end session", record_session())
    if arguments.check:
        if new != old:
            print("README.md is out of date: run tools/update_readme.py", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
