"""The tables of docs/ about the layer calls and the kernels around them, from result files.

Each function takes a file of benchmarks/results, or None where there is none, and gives Markdown,
then nothing.
"""

from __future__ import annotations

from typing import Any

import markdown_parts

Result = dict[str, Any]
MODES = {"graph": "in CUDA graphs", "eager": "eager"}


def machine_text(result: Result) -> str:
    """What was measured on, and the read ceiling."""
    machine, ceiling = result["machine"], result["ceiling"]
    driver = "".join(f", driver {version}" for version in machine.get("driver", []))
    by = "" if ceiling["measured_by"] == "given" else f", as {ceiling['measured_by']} measures it"
    return (
        f"{machine['device']}{driver}, torch {machine['torch']}; the read ceiling is "
        f"{ceiling['bytes_per_second'] / 1e12:.2f} TB/s{by}"
    )


def spread_text(times: dict[str, float]) -> str:
    """A time with its smallest and largest, in microseconds."""
    return f"{times['us']:.1f} ({times['low']:.1f} to {times['high']:.1f})"


def call_text(model: str, call: str) -> str:
    """A call by its name, if it is a model's own."""
    own = model in ("pythia_2b8", "pythia_6b9")
    return f"`{model}_{call}`" if own else f"{model}: {call.replace('_', ' ')}"


def layer_calls_table(result: Result | None) -> str:
    """Each call beside PyTorch."""
    if result is None:
        return ""
    head = ["call", "context", "µs a layer", "PyTorch, µs", "times as fast"]
    lines = [[*head, "share of the read ceiling", "error", "PyTorch's error"]]
    for model in result["models"]:
        for row in model["calls"]:
            ours, theirs = row["clusterfusion"], row["pytorch"]
            lines.append(
                [
                    call_text(model["model"], row["call"]),
                    "any" if row["context"] is None else str(row["context"]),
                    f"**{spread_text(ours)}**",
                    spread_text(theirs),
                    f"{theirs['us'] / ours['us']:.2f}",
                    f"{100 * row['share_of_ceiling']:.1f} %",
                    *(f"{side['relative_error']:.1e}" for side in (ours, theirs)),
                ]
            )
    layers = ", ".join(f"{m['layers']} layers of {m['model']}" for m in result["models"])
    return (
        f"Each call beside PyTorch's functional layers, {result['mode']}, {result['dtype']}: "
        f"{machine_text(result)}. {layers}, each with random weights of its own, so that nothing "
        f"is found in the cache; {result['rounds']} rounds of both in turns, medians with smallest "
        "and largest. Errors are those of the worst result against float64.\n\n"
        f"{markdown_parts.table(lines)}"
    )


def layer_options_table(result: Result | None) -> str:
    """Pages, grouped heads and several rows beside the plain call."""
    if result is None:
        return ""
    head = ["`decoder_layer`", "context", "µs a layer", "times the plain call"]
    lines = [[*head, "share of the read ceiling"]]
    for row in result["cases"]:
        lines.append(
            [
                row["case"],
                str(row["context"]),
                f"**{spread_text(row)}**",
                f"{row['times_plain']:.3f}",
                f"{100 * row['share_of_ceiling']:.1f} %",
            ]
        )
    return (
        f"The whole layer of {result['model']} with options, beside the plain call in the same "
        f"run, {result['mode']}, {result['dtype']}: {machine_text(result)}. {result['layers']} "
        f"layers with weights and caches of their own; {result['rounds']} rounds of all cases in "
        "turns, medians with smallest and largest. The ceiling is that of all bytes that a call "
        f"must read.\n\n{markdown_parts.table(lines)}"
    )


def call_overhead_table(*results: Result | None) -> str:
    """What a call costs from Python, reading by reading."""
    columns = {
        "a model's decoder_layer": "`pythia_…_decoder_layer`",
        "a model's attention_only": "`…_attention_only`",
        "a model's mlp_only": "`…_mlp_only`",
        "decoder_layer": "`ops.decoder_layer`",
        "decoder_layer, out": "`out=`",
        "attention_mlp_up": "`attention_mlp_up`",
        "attention_mlp_up, out": "`out=`",
        "mlp_down": "`mlp_down`",
        "mlp_down, out": "`out=`",
        "decoder_layer, not computed": "`decoder_layer`, not computed",
        "decoder_layer, out, not computed": "`out=`",
        "torch.add": "`torch.add`",
        "torch.add, out": "`out=`",
    }
    readings = [reading for result in results if result for reading in result["readings"]]
    if not readings:
        return ""

    def cell(reading: Result, name: str) -> str:
        times = reading["microseconds_per_call"].get(name)
        return f"{times['median']:.1f} ({times['smallest']:.1f})" if times else ""

    lines = [["µs a call, median (smallest)", *columns.values()]]
    for reading in readings:
        device = reading["machine"]["device"].removeprefix("NVIDIA ").partition(" ")[0].rstrip(",")
        lines.append(
            [f"{device}, host {reading['host']}", *(cell(reading, name) for name in columns)]
        )
    return markdown_parts.table(lines)


def ablation_table(rows: list[dict[str, Any]], mode: str) -> str:
    """A token by variant and position, in one mode; nothing if it was not measured."""
    chosen = {(r["variant"], r["position"]): r for r in rows if r["mode"] == mode}
    if not chosen:
        return ""
    positions = sorted({position for _, position in chosen})
    lines = [[f"ms a token, {MODES[mode]}", *map(str, positions), "error"]]
    for variant in dict.fromkeys(variant for variant, _ in chosen):
        found = [chosen[variant, position] for position in positions]
        cells = [
            f"{row['seconds_per_token'] * 1e3:.3f} "
            f"({row['speedup']:.2f}, {100 * row['share_of_ceiling']:.0f} %)"
            for row in found
        ]
        lines.append([variant, *cells, f"{max(row['relative_error'] for row in found):.1e}"])
    return markdown_parts.table(lines)


def ablation_tables(result: Result | None) -> str:
    """What each part gains."""
    if result is None:
        return ""
    tables = [ablation_table(result["results"], mode) for mode in MODES]
    image = "![Milliseconds a token by variant and position](images/layer_ablation.svg)\n"
    return (
        f"A token over {result['layers']} layers of {result['model']} ({result['dtype']}) at so "
        "many positions in the cache, with each part fused or PyTorch's: milliseconds (times as "
        "fast as PyTorch, share of the read ceiling). "
        f"{machine_text(result)}; medians of {result['rounds']} tokens. Errors are the largest of "
        "a layer's output against float64.\n\n"
        + "\n".join(filter(None, [*tables, image if tables[0] else ""]))
    )


def sample_time_table(results: list[Result] | None) -> str:
    """The sampling kernel by setting and distribution of the logits."""
    parts = []
    for result in results or []:
        kernels = {(row["setting"], row["logits"]): row for row in result["kernels"]}
        settings = dict.fromkeys(setting for setting, _ in kernels)
        logits = dict.fromkeys(name for _, name in kernels)
        lines = [["µs a token", *(f"logits: {name}" for name in logits)]]
        for setting in settings:
            lines.append([setting, *(spread_text(kernels[setting, name]) for name in logits)])
        parts.append(
            f"The sampling kernel on {result['device']}, {result['vocab']} random logits, normal "
            f"with that deviation or all alike; medians of {result['repeats']} with smallest and "
            f"largest, each the mean of {result['steps']} tokens.\n\n{markdown_parts.table(lines)}"
        )
    return "\n".join(parts)
