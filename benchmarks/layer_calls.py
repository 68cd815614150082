"""Time each layer call beside PyTorch's functional layers, and say how exact both are.

Each layer has weights of its own, so nothing of it is found in the cache when its turn comes again;
there are fewer layers than asked for where the GPU's memory does not hold them.
On a GPU all layers are one CUDA graph, ours and PyTorch's replayed in turns; on the CPU the calls
run eagerly. Prints a table on stderr and writes JSON (docs/testing.md says what is in it):

    python benchmarks/layer_calls.py --output benchmarks/results/layer_calls_h100.json

Needs torch. `--model tiny` checks the program itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clusterfusion.pythia import LayerCalls, LayerSizes, layer_calls

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import layer_timing as timing
import torch_layer
from torch_layer import Sizes, Tensors

# Of a hidden size that is not streamed.
NOT_STREAMED = {"gpt_neox_20b": Sizes(6144, 24576, 64, 24)}
MODELS = torch_layer.MODELS | NOT_STREAMED | {"tiny": torch_layer.TINY}
FULL_SIZES = list(torch_layer.MODELS)
CONTEXTS = [128, 2047]
# What other tensors and PyTorch itself may take of a GPU's memory.
SHARE_OF_MEMORY = 0.7
Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One layer call and the same in PyTorch, and the bytes that either must read."""

    name: str
    ours: Callable[[Tensors], Results]
    theirs: Callable[[Tensors], Results]
    bytes_read: int
    context: int | None = None  # None: it does not matter


def halves(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Give what the first half of a layer has left for the second."""
    return t["attn_output"], t["mlp_intermediate"]


def calls_of(calls: LayerCalls, sizes: Sizes, contexts: list[int]) -> list[Call]:
    """Give the second half of a layer, then the first half and all of it at each context."""
    down = Call(
        "mlp_only",
        lambda t: (
            calls.mlp_only(t["input"], *halves(t), t["mlp_down_weight"], t["mlp_down_bias"]),
        ),
        lambda t: (torch_layer.mlp_down(t, *halves(t)),),
        sizes.bytes_of_down,
    )
    found = [down]
    for context in contexts:
        first = sizes.bytes_of_attention_and_up + sizes.bytes_of_cache(context)
        found.append(
            Call(
                "attention_only",
                lambda t, c=context: calls.attention_only(*list(t.values())[:15], c),
                lambda t, c=context: torch_layer.attention_mlp_up(t, sizes, c),
                first,
                context,
            )
        )
        whole = {
            "decoder_layer": calls.decoder_layer,
            "decoder_layer_split": calls.decoder_layer_split,
        }
        for name, function in whole.items():
            found.append(
                Call(
                    name,
                    lambda t, f=function, c=context: f(*list(t.values())[:17], c),
                    lambda t, c=context: torch_layer.decoder_layer(t, sizes, c),
                    first + sizes.bytes_of_down,
                    context,
                )
            )
    return found


def layers_that_fit(sizes: Sizes, rows: int, wanted: int, device: torch.device) -> int:
    """Give the number of layers, at most `wanted`, that the device's free memory holds."""
    if device.type != "cuda":
        return wanted
    layer = sizes.bytes_of_attention_and_up + sizes.bytes_of_down + sizes.bytes_of_cache(rows)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(wanted, int(SHARE_OF_MEMORY * free / layer)))


def random_layers(sizes: Sizes, args: argparse.Namespace) -> list[Tensors]:
    """Draw layers, each with what its own first half gives for the second."""
    rows, dtype = max(args.contexts) + 1, getattr(torch, args.dtype)
    layers = [
        torch_layer.random_tensors(sizes, dtype, args.device, rows, seed)
        for seed in range(layers_that_fit(sizes, rows, args.layers, args.device))
    ]
    for t in layers:
        t["attn_output"], t["mlp_intermediate"], _, _ = torch_layer.attention_mlp_up(t, sizes, 0)
    return layers


def worst_error(results: Results, references: Results) -> float:
    """Give the relative error of the result that is furthest off."""
    return max(map(torch_layer.relative_error, results, references))


def spread(times: list[float], steps: int) -> dict[str, float]:
    """Give microseconds a step from seconds of all steps: the median and the extremes."""
    each = [seconds / steps * 1e6 for seconds in times]
    return {"us": statistics.median(each), "low": min(each), "high": max(each)}


def measure(
    call: Call, layers: list[Tensors], ceiling: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Time one call and PyTorch in turns, and compare both with float64."""
    reference = call.theirs(torch_layer.widened(layers[0]))
    steps = [[lambda t=t, f=f: f(t) for t in layers] for f in (call.ours, call.theirs)]
    if args.device.type == "cuda":
        runs = [timing.capture(side).replay for side in steps]
    else:
        runs = [timing.all_of(side) for side in steps]
    times = timing.alternating_seconds(runs, args.device, args.rounds, behind=True)
    ours, theirs = (
        spread(seconds, len(layers)) | {"relative_error": worst_error(side[0](), reference)}
        for seconds, side in zip(times, steps, strict=True)
    )
    return {
        "call": call.name,
        "context": call.context,
        "bytes_read": call.bytes_read,
        "clusterfusion": ours,
        "pytorch": theirs,
        "share_of_ceiling": call.bytes_read / ceiling / (ours["us"] * 1e-6),
    }


def measure_model(name: str, ceiling: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all calls for one model's layers."""
    sizes = MODELS[name]
    common = LayerSizes(sizes.hidden, sizes.intermediate, sizes.num_heads, sizes.rotary_dim)
    layers = random_layers(sizes, args)
    rows = [
        measure(call, layers, ceiling, args)
        for call in calls_of(layer_calls(name, common), sizes, args.contexts)
    ]
    return {"model": name, "layers": len(layers), "calls": rows}


def print_table(models: list[dict[str, Any]]) -> None:
    """Show what was measured."""
    head = ["model", "call", "context", "us", "low", "high", "PyTorch", "ceiling", "error"]
    cells = [
        [
            model["model"],
            row["call"],
            "any" if row["context"] is None else row["context"],
            *(f"{row['clusterfusion'][key]:.1f}" for key in ("us", "low", "high")),
            f"{row['pytorch']['us']:.1f}",
            f"{row['share_of_ceiling']:.1%}",
            f"{row['clusterfusion']['relative_error']:.1e}",
            f"{row['pytorch']['relative_error']:.1e}",
        ]
        for model in models
        for row in model["calls"]
    ]
    print(timing.table([*head, "PyTorch's"], cells), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=FULL_SIZES)
    timing.add_layer_arguments(parser, rounds=50)
    timing.add_result_arguments(parser, CONTEXTS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    ceiling = timing.ceiling_of(args)
    bytes_per_second = ceiling["bytes_per_second"]
    models = [measure_model(name, bytes_per_second, args) for name in args.model]
    print_table(models)
    return {
        **timing.conditions(args),
        "ceiling": ceiling,
        "models": models,
    }


def main() -> None:
    """Measure, and write what was found."""
    args = parse_arguments()
    with torch.inference_mode():
        timing.write_result(run(args), args.output)


if __name__ == "__main__":
    main()
