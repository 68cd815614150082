#!/usr/bin/env python3
"""Fill the generated parts of README.md and docs/*.md.

Examples come from examples/, tables from benchmarks/results/; without a result file there is
nothing in its place.

update_readme.py            rewrite them
update_readme.py --check    exit with 1 if a document is not what would be written
update_readme.py --session  also run the demo (as `make generate` does) and record it
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import layer_tables  # noqa: E402
import markdown_parts  # noqa: E402
import speculation_tables  # noqa: E402
from gpu_results import (  # noqa: E402
    COMPARED,
    contexts_of,
    decode_time_picture,
    load_results,
    load_serving,
    serving_pictures,
    short_contexts,
)

README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"


def include_examples(text: str) -> str:
    """Refresh each example that the README shows."""
    for language, name in re.findall(r"<!-- include (\w+) (\S+) -->", text):
        code = (ROOT / name).read_text(encoding="utf-8").rstrip()
        text = markdown_parts.replace_part(
            text, f"include {language} {name}", "end include", f"```{language}\n{code}\n```\n"
        )
    return text


def load(name: str) -> Any:
    """One result file, or nothing."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def spread_text(row: dict[str, float]) -> str:
    """A time with its smallest and largest, in milliseconds."""
    digits = 3 if row["high"] < 10 else 1
    return f"{row['ms_per_token']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def gpu_compared_table(chip: str, result: dict[str, Any], about: str) -> str:
    """One model beside its rivals, by context."""
    ours = {row["context"]: row for row in contexts_of(result)}
    rivals = {rival["name"]: rival for rival in result["rivals"]}
    rows = {"**ClusterFusion**": ours} | {
        name: {row["context"]: row for row in rival["contexts"]} for name, rival in rivals.items()
    }
    best = {
        context: min(
            (rows[name][context]["ms_per_token"] for name in rivals if context in rows[name]),
            default=None,
        )
        for context in ours
    }
    lines = [[f"{COMPARED}, ms a token", *(f"context {context}" for context in ours)]]
    for name, row in rows.items():
        failure = rivals.get(name, {}).get("error", NOT_MEASURED)
        lines.append([name, *(spread_text(row[c]) if c in row else failure for c in ours)])
    if rivals:
        faster = (f"{best[c] / ours[c]['ms_per_token']:.2f}" if best[c] else "" for c in ours)
        lines.append(["times as fast as the best rival measured", *faster])
    lines.append(
        ["share of the read ceiling", *(f"{100 * r['ceiling_share']:.1f} %" for r in ours.values())]
    )
    ceiling = next(
        m["read_ceiling_bytes_per_second"] for m in result["models"] if m["model"] == COMPARED
    )
    versions = ", ".join(
        f"{name} {result[name]}" for name in ("torch", "transformers") if result.get(name)
    )
    remark = f" {result['remark']}" if "remark" in result else ""
    return (
        f"GPU, {result['device']}, driver {result['driver']}: {about}. It reads at most "
        f"{ceiling / 1e12:.2f} TB/s, measured by the same process{'; ' if versions else ''}"
        f"{versions}.{remark}\n\n{markdown_parts.table(lines)}\n"
        f"![Milliseconds a token against the context, {chip}]"
        f"(docs/images/{decode_time_picture(chip)})\n"
    )


def gpu_sizes_table(results: dict[str, dict[str, Any]]) -> str:
    """All sizes at a short context, on each chip."""
    names = [model["model"] for model in next(iter(results.values()))["models"]]
    lines = [["context 128", *(name.removeprefix("pythia-") for name in names)]]
    for chip, result in results.items():
        rows = dict(short_contexts(result))
        known = [rows.get(name) for name in names]
        lines.append(
            [f"{chip}, ms a token", *(f"{r['ms_per_token']:.3f}" if r else "" for r in known)]
        )
        shares = (f"{100 * r['ceiling_share']:.0f} %" if r else "" for r in known)
        lines.append([f"{chip}, share of the read ceiling", *shares])
    return (
        f"{markdown_parts.table(lines)}\n"
        "![Share of the read ceiling by model](docs/images/ceiling_share.svg)\n"
    )


def gpu_tables(results: dict[str, dict[str, Any]]) -> list[str]:
    """What there is about GPUs."""
    compared = {chip: result for chip, result in results.items() if contexts_of(result)}
    tables = [
        gpu_compared_table(chip, result, "the same" if i else result["what"])
        for i, (chip, result) in enumerate(compared.items())
    ]
    return tables + ([gpu_sizes_table(results)] if results else [])


def llama_rival_row(result: dict[str, Any], context: int, models: list[str]) -> list[str]:
    """Time a token of the rival that was measured beside some of the models."""
    rivals = {rival["model"]: rival for rival in result["rivals"]}
    cells = [NOT_MEASURED] * len(models)
    for i, model in enumerate(models):
        for row in rivals.get(model, {}).get("contexts", []):
            if row["context"] == context:
                cells[i] = f"{row['ms_per_token']:.2f}"
    (name,) = {rival["name"] for rival in result["rivals"]}
    return [name, *cells]


def llama_table() -> str:
    """Time a token of Llama and its relatives on a GPU."""
    result = load("llama_h200.json")
    if result is None:
        return ""
    contexts = (128, 8192)
    models = [model for model in result["models"] if len(model["contexts"]) >= len(contexts)]
    lines = [["one sequence, random bfloat16 weights, H200", *(m["model"] for m in models)]]
    for context in contexts:
        rows = [row for m in models for row in m["contexts"] if row["context"] == context]
        lines.append(
            [f"context {context}, ms a token", *(f"{r['ms_per_token']:.3f}" for r in rows)]
        )
        shares = (f"{100 * r['ceiling_share']:.0f} %" for r in rows)
        lines.append(["share of the read ceiling", *shares])
        lines.append(llama_rival_row(result, context, [m["model"] for m in models]))
    longest = max(models[0]["contexts"], key=lambda row: row["context"])
    return (
        f"{markdown_parts.table(lines)}\n"
        f"At {longest['context']} positions a token of {models[0]['model']} takes "
        f"{longest['ms_per_token']:.2f} ms ({100 * longest['ceiling_share']:.0f} %). The static "
        "cache has room for 8192 positions at either context, and a step attends to all of it.\n"
    )


def prefill_table() -> str:
    """Prompts on the GPU beside transformers."""
    result = load("prefill_h200.json")
    if result is None:
        return ""
    (ours,) = (m["prompts"] for m in result["models"] if m["model"] == COMPARED)
    theirs = {row["tokens"]: row for row in result["rivals"]}

    def cell(row: dict[str, float] | None) -> str:
        return f"{row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if row else NOT_MEASURED

    lines = [
        [f"{COMPARED} on H200, ms to the first token", *(f"{r['tokens']} tokens" for r in ours)],
        ["**ClusterFusion**", *(cell(row) for row in ours)],
        ["transformers", *(cell(theirs.get(row["tokens"])) for row in ours)],
    ]
    return markdown_parts.table(lines)


def load_table() -> str:
    """How fast a checkpoint comes onto the GPU."""
    result = load("load_h100.json")
    if result is None:
        return ""
    seconds = result["seconds"]
    speed, bus = (result[key] / 1e9 for key in ("bytes_per_second", "bus_bytes_per_second"))
    return (
        f"Loading: {result['what']} takes {seconds['median']:.2f} s ({seconds['low']:.2f} to "
        f"{seconds['high']:.2f}) on {result['device']}: {speed:.1f} GB/s, where the bus alone "
        f"gives {bus:.1f}.\n"
    )


def rows_table() -> str:
    """What a step of several sequences takes on a GPU."""
    result = load("rows_h200.json")
    if result is None:
        return ""
    times = [
        time
        for model in result["results"]
        if model["model"] == "pythia-2.8b"
        for time in model["times"]
    ]
    short = [time for time in times if time["context"] == 128]
    [alone] = [time["ms_per_step"] for time in short if time["kernel"] == "one row"]
    together = [time for time in short if time["kernel"] == "rows"]
    lines = [
        "| pythia-2.8b on H200, context 128, sequences | "
        + " | ".join(str(time["rows"]) for time in together)
        + " |",
        "|---|" + "---|" * len(together),
    ]
    columns = {
        "ms a step": lambda time: f"{time['ms_per_step']:.2f}",
        "over one sequence alone": lambda time: f"{time['ms_per_step'] / alone:.2f}",
        "tokens/s": lambda time: f"{1000 * time['rows'] / time['ms_per_step']:.0f}",
    }
    for name, text in columns.items():
        lines.append(f"| {name} | " + " | ".join(map(text, together)) + " |")
    return (
        f"Many sequences at once (mode `throughput`), beside {alone:.2f} ms for each sequence "
        "alone (mode `latency`); same card and run:\n\n"
        + "\n".join(lines)
        + "\n\n![Milliseconds a step of several sequences](docs/images/rows_h200.svg)\n\n"
        + unstreamed_line(result)
    )


def unstreamed_line(result: dict) -> str:
    """What a step of GPT-NeoX-20B takes, whose sizes do not stream."""
    [model] = [model for model in result["results"] if model["model"] == "gpt-neox-20b"]
    steps = " and ".join(
        f"{time['ms_per_step']:.1f} ms a step of {time['rows']} ({time['ceiling_share']:.0%} of "
        "the ceiling)"
        for time in model["times"]
        if time["kernel"] == "rows" and time["rows"] in (1, 32)
    )
    return f"GPT-NeoX-20B, by a series of kernels: {steps}.\n"


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


def readme(text: str) -> str:
    """README.md with examples and tables as they are now."""
    tables = [*gpu_tables(load_results(RESULTS)), llama_table(), rows_table(), prefill_table()]
    tables += [load_table()]
    tables += [cpu_table(), memory_table(), tokenizer_table()]
    return with_tables(include_examples(text), "tables", tables)


def with_tables(text: str, part: str, tables: list[str], head: str = "") -> str:
    """A document with those tables that there are in a part of it, below a head if there is one."""
    known = "\n".join(filter(None, tables))
    return markdown_parts.replace_part(text, part, f"end {part}", head + known if known else "")


def layer_calls(text: str) -> str:
    """docs/layer-calls.md with its tables."""
    tables = [
        layer_tables.layer_calls_table(load("layer_calls_h100.json")),
        layer_tables.layer_calls_table(load("layer_calls_plain_h100.json")),
        layer_tables.layer_options_table(load("layer_options_h200.json")),
        layer_tables.ablation_tables(load("ablation_h100.json")),
    ]
    text = with_tables(text, "measured", tables, "## Measured\n")
    chips = ("h100", "h200", "cpu")
    costs = [layer_tables.call_overhead_table(*(load(f"call_overhead_{c}.json") for c in chips))]
    return with_tables(text, "cost", costs, "")


def sampling_kernel(text: str) -> str:
    """docs/sampling-kernel.md with the sampling kernel's times."""
    tables = [layer_tables.sample_time_table(load("sample_time_h100.json"))]
    return with_tables(text, "sampling times", tables)


def serving_table() -> str:
    """The server on a GPU beside the engine, and beside a rival's record."""
    found = load_serving(RESULTS)
    if found is None:
        return ""
    ours, rival = found
    recorded = {row["clients"]: row for row in rival["rows"]} if rival else {}
    lines = [["", *(f"{row['clients']} clients" for row in ours["rows"])]]
    for measure, name in (("first_token_ms", "first token, ms"), ("per_token_ms", "a token, ms")):
        for side, whose in (("server", "**server**"), ("engine", "engine alone")):
            cells = (row[side][measure] for row in ours["rows"])
            times = [f"{cell['median']:.2f} (p95 {cell['p95']:.2f})" for cell in cells]
            lines.append([f"{name}: {whose}", *times])
        lines += recorded_line(name, measure, ours, rival, recorded)
    speeds = [f"{row['server']['tokens_per_second']:.0f}" for row in ours["rows"]]
    lines.append(["tokens/s: **server**", *speeds])
    lines += recorded_line("tokens/s", "tokens_per_second", ours, rival, recorded)
    images = "".join(
        f"\n![{title.capitalize()}](images/{name})\n" for name, title in serving_pictures().values()
    )
    return (
        f"{ours['model']} on {ours['device']}, streams of {ours['prompt_tokens']} + "
        f"{ours['new_tokens']} tokens (`benchmarks/serve_latency.py`), medians:\n\n"
        f"{markdown_parts.table(lines)}{images}"
    )


def recorded_line(
    name: str, measure: str, ours: dict, rival: dict | None, recorded: dict[int, dict]
) -> list[list[str]]:
    """A rival's row of a table, or none."""
    if rival is None:
        return []
    found = [recorded.get(row["clients"]) for row in ours["rows"]]
    cells = [f"{row[measure]:g}" if row else NOT_MEASURED for row in found]
    return [[f"{name}: {rival['name']}, recorded {rival['date']}", *cells]]


def soak_line() -> str:
    """What the server did with very many clients for a long time."""
    result = load("serving_soak_cpu.json")
    if result is None:
        return ""
    times, bad = result["client_seconds_a_request"], sum(result["bad_clients"].values())
    sockets = result["sockets"]["after"] - result["sockets"]["before"]
    remark = f" ({result['remark']})" if "remark" in result else ""
    minutes = round(result["seconds"] / 60)
    return (
        f"{result['clients']} streaming clients at once for {minutes} minutes on "
        f"{result['device']}{remark}, and {bad} visits of clients that left in the middle, sent "
        f"garbage or said nothing (`benchmarks/serve_soak.py`): {result['requests']} requests, "
        f"{result['wrong_texts']} texts that were not those of the engine alone, "
        f"{result['failed_requests']} failures. A request took the slowest client "
        f"{times['slowest_over_median']:.2f} times what it took the median one; the server's "
        f"memory grew by {result['memory_growth_mb']:.1f} MB from the second quarter of the time "
        f"to the last, and {max(sockets, 0)} sockets stayed.\n"
    )


def serving(text: str) -> str:
    """docs/serving.md with the server's times on a GPU, and how it bears crowds."""
    text = with_tables(text, "crowd", [soak_line()])
    return with_tables(text, "serving times", [serving_table()])


def speculation(text: str) -> str:
    """docs/speculation.md with what drafts gain on a GPU, and on many cores."""
    on_gpu, on_cpu = load("speculation_h200.json"), load("speculation_texts_cpu.json")
    tables = [
        speculation_tables.theory_table(on_gpu),
        speculation_tables.texts_table(on_gpu),
        speculation_tables.computed_table(on_gpu),
        speculation_tables.texts_table(on_cpu),
    ]
    return with_tables(text, "measured drafts", tables)


def documents() -> dict[Path, Callable[[str], str]]:
    """What fills each document."""
    return {
        README: readme,
        DOCS / "layer-calls.md": layer_calls,
        DOCS / "sampling-kernel.md": sampling_kernel,
        DOCS / "serving.md": serving,
        DOCS / "speculation.md": speculation,
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--session", action="store_true", help="record the demo as well")
    arguments = parser.parse_args()
    stale = 0
    for path, fill in documents().items():
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if arguments.session and path == README:
            new = markdown_parts.replace_part(new, "session", "end session", record_session())
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            name = path.relative_to(ROOT)
            print(f"{name} is out of date: run tools/update_readme.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
