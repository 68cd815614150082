"""What each fused call gains over PyTorch: time a token over all layers, by parts.

The layers have weights of their own, so none of them is found in the cache, and each takes the
output of the one before. Prints a table on stderr and writes JSON, for example

    python benchmarks/ablation.py --output benchmarks/results/ablation_h100.json

Needs torch, and a GPU for CUDA graphs; without one it runs the eager half on the CPU (--model tiny
checks the program itself).
"""

from __future__ import annotations

import argparse
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

MODELS = torch_layer.MODELS | {"tiny": torch_layer.TINY}
CONTEXTS = [16, 128, 512, 1024, 2047]
BASELINE = "PyTorch"
# What a context keeps, in the order of create_graph_context.
KEPT = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
# output of a layer from its index, input and position
Layer = Callable[[int, torch.Tensor, int], torch.Tensor]


@dataclass
class Model:
    """Layers with random weights, and the fused calls for their size."""

    sizes: Sizes
    layers: list[Tensors]
    calls: LayerCalls

    @classmethod
    def make(cls, args: argparse.Namespace) -> Model:
        """Draw the weights and create a graph context for each layer."""
        sizes, dtype = MODELS[args.model], getattr(torch, args.dtype)
        rows = max(args.contexts) + 1
        layers = [
            torch_layer.random_tensors(sizes, dtype, args.device, rows, seed)
            for seed in range(args.layers)
        ]
        common = LayerSizes(sizes.hidden, sizes.intermediate, sizes.num_heads, sizes.rotary_dim)
        calls = layer_calls(args.model, common)
        for index, t in enumerate(layers):
            calls.create_graph_context(index, *(t[name] for name in KEPT), rows)
        return cls(sizes, layers, calls)

    def bytes_per_token(self, position: int) -> int:
        """Count what a token must read: matrices, and keys and values of all positions."""
        sizes = self.sizes
        matrices = sizes.bytes_of_attention_and_up + sizes.bytes_of_down
        return len(self.layers) * (matrices + sizes.bytes_of_cache(position))

    def variants(self) -> dict[str, Layer]:
        """Give one layer in each way."""
        sizes, calls = self.sizes, self.calls

        def at(index: int, x: torch.Tensor) -> Tensors:
            self.layers[index]["input"] = x
            return self.layers[index]

        def pytorch(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            return torch_layer.decoder_layer(at(index, x), sizes, position)[0]

        def fused_attention(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            t = at(index, x)
            parts = calls.attention_only(*list(t.values())[:15], position)
            return torch_layer.mlp_down(t, *parts[:2])

        def fused_down(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            t = at(index, x)
            parts = torch_layer.attention_mlp_up(t, sizes, position)
            return calls.mlp_only(x, *parts[:2], t["mlp_down_weight"], t["mlp_down_bias"])

        def split(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            return calls.decoder_layer_split(*at(index, x).values(), position)[0]

        def fused(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            return calls.decoder_layer(*at(index, x).values(), position)[0]

        def context(index: int, x: torch.Tensor, position: int) -> torch.Tensor:
            t = at(index, x)
            norms = (t["ln_weight"], t["ln_bias"], t["bias_qkv"], t["bias_o"])
            rotary = (t["cos"], t["sin"], t["k_cache"], t["v_cache"])
            mlp = (t["post_ln_weight"], t["post_ln_bias"], t["mlp_up_bias"], t["mlp_down_bias"])
            return calls.graph_decode_step(index, x, *norms, *rotary, *mlp, position)[0]

        return {
            BASELINE: pytorch,
            "fused attention and MLP-up, PyTorch MLP-down": fused_attention,
            "PyTorch attention and MLP-up, fused MLP-down": fused_down,
            "fused, split": split,
            "fused": fused,
            "fused, graph context": context,
        }


def errors(model: Model, position: int) -> dict[str, float]:
    """Compare the first layer of each variant with float64."""
    t = model.layers[0]
    reference = torch_layer.decoder_layer(torch_layer.widened(t), model.sizes, position)[0]
    x = t["input"]
    return {
        name: torch_layer.relative_error(layer(0, x, position), reference)
        for name, layer in model.variants().items()
    }


def token(model: Model, layer: Layer, x: torch.Tensor, position: int) -> torch.Tensor:
    """Compute all layers, one after the other."""
    for index in range(len(model.layers)):
        x = layer(index, x, position)
    return x


def measure(model: Model, position: int, ceiling: float, args: argparse.Namespace) -> list[dict]:
    """Time every variant at one position, eagerly and in a CUDA graph."""
    found, baseline, rows = errors(model, position), {}, []
    x = model.layers[0]["input"]
    for name, layer in model.variants().items():
        steps = [lambda layer=layer: token(model, layer, x, position)]
        for mode, function in (("eager", timing.eager_seconds), ("graph", timing.graph_seconds)):
            seconds = function(steps, args.device, args.rounds)
            if seconds is None:
                continue
            baseline.setdefault(mode, seconds)
            rows.append(
                {
                    "position": position,
                    "variant": name,
                    "mode": mode,
                    "seconds_per_token": seconds,
                    "seconds_per_layer": seconds / len(model.layers),
                    "speedup": baseline[mode] / seconds,
                    "share_of_ceiling": model.bytes_per_token(position) / ceiling / seconds,
                    "relative_error": found[name],
                }
            )
    return rows


def print_table(rows: list[dict]) -> None:
    """Show what was measured."""
    head = ["position", "mode", "ms/token", "us/layer", "speed-up", "ceiling", "error", "variant"]
    cells = [
        [
            row["position"],
            row["mode"],
            f"{row['seconds_per_token'] * 1e3:.3f}",
            f"{row['seconds_per_layer'] * 1e6:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['share_of_ceiling']:.1%}",
            f"{row['relative_error']:.1e}",
            row["variant"],
        ]
        for row in rows
    ]
    print(timing.table(head, cells), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="pythia_2b8")
    timing.add_layer_arguments(parser, rounds=20, layers=32)
    timing.add_result_arguments(parser, CONTEXTS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    ceiling = timing.ceiling_of(args)
    bytes_per_second = ceiling["bytes_per_second"]
    model = Model.make(args)
    rows = [
        row
        for position in args.contexts
        for row in measure(model, position, bytes_per_second, args)
    ]
    print_table(rows)
    return {
        "machine": timing.machine(args.device),
        "model": args.model,
        "dtype": args.dtype,
        "layers": args.layers,
        "rounds": args.rounds,
        "ceiling": ceiling,
        "results": rows,
    }


def main() -> None:
    """Measure, and write what was found."""
    args = parse_arguments()
    with torch.inference_mode():
        timing.write_result(run(args), args.output)


if __name__ == "__main__":
    main()
