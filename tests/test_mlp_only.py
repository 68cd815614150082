"""MLP-down and the sum of a layer in one call beside PyTorch.

As a script it checks and times the call against PyTorch, on the GPU if there is one, and prints a
table: python tests/test_mlp_only.py --help. Under pytest the same checks are tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import clusterfusion  # noqa: E402
import layer_timing as timing  # noqa: E402
import torch_layer  # noqa: E402
from torch_layer import MODELS, Tensors, relative_error  # noqa: E402

DEVICE = timing.default_device()
# The time of a test on the CPU is that of PyTorch in float64.
CASES = torch_layer.tested_layers(
    ["pythia_2b8", "pythia_6b9"] if DEVICE.type == "cuda" else ["pythia_2b8"]
)
WEIGHTS = ("mlp_down_weight", "mlp_down_bias")


def random_tensors(model: str, dtype: str, seed: int, heavy_tailed: bool = False) -> Tensors:
    """A layer's tensors, and what its first half might give."""
    sizes = MODELS[model]
    tensors = torch_layer.random_tensors(
        sizes, getattr(torch, dtype), DEVICE, 1, seed, heavy_tailed=heavy_tailed
    )
    tensors["attn_output"], _, _ = torch_layer.attention(tensors, sizes, 0)
    tensors["mlp_intermediate"] = torch_layer.mlp_up(tensors, sizes)
    names = ("input", "attn_output", "mlp_intermediate", *WEIGHTS)
    return {name: tensors[name] for name in names}


def mlp_only(model: str, tensors: Tensors) -> torch.Tensor:
    return getattr(clusterfusion, f"{model}_mlp_only")(*tensors.values())


def mlp_only_of_torch(tensors: Tensors) -> torch.Tensor:
    return torch_layer.mlp_down(tensors, tensors["attn_output"], tensors["mlp_intermediate"])


# ---- tests ----


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[str, Tensors]]:
    model, dtype, heavy_tailed = request.param
    with torch.inference_mode():
        yield model, random_tensors(model, dtype, 0, heavy_tailed)


def test_error_is_at_most_that_of_torch(layer):
    model, tensors = layer
    with torch.inference_mode():
        reference = mlp_only_of_torch(torch_layer.widened(tensors))
        ours = relative_error(mlp_only(model, tensors), reference)
        theirs = relative_error(mlp_only_of_torch(tensors), reference)
    assert ours <= theirs


def test_one_bit_pattern(layer):
    model, tensors = layer
    with torch.inference_mode():
        expected = mlp_only(model, tensors)
        for _ in range(10_000 if DEVICE.type == "cuda" else 20):
            assert torch.equal(mlp_only(model, tensors), expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_graph_gives_the_same_bits(layer):
    model, tensors = layer
    results = []
    with torch.inference_mode():
        graph = timing.capture([lambda: results.append(mlp_only(model, tensors))])
        for scale in (1.0, 0.5):
            tensors["mlp_intermediate"] *= scale
            graph.replay()
            assert torch.equal(results[-1], mlp_only(model, tensors))


# ---- script ----


def report(args: Any) -> list[str]:
    sizes = MODELS[args.model]
    layers = [random_tensors(args.model, args.dtype, seed) for seed in range(args.layers)]
    reference = mlp_only_of_torch(torch_layer.widened(layers[0]))
    ours = [lambda t=t: mlp_only(args.model, t) for t in layers]
    theirs = [lambda t=t: mlp_only_of_torch(t) for t in layers]
    times = [
        function(steps, DEVICE, args.rounds)
        for function in (timing.eager_seconds, timing.graph_seconds)
        for steps in (ours, theirs)
    ]
    best = times[2] or times[0]
    return [
        *(f"{relative_error(steps[0](), reference):.2e}" for steps in (ours, theirs)),
        *map(timing.microseconds, times),
        f"{sizes.bytes_of_down / best / 1e9:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="pythia_2b8")
    timing.add_layer_arguments(parser, rounds=20)
    args = parser.parse_args()
    with torch.inference_mode():
        row = report(args)
    device = timing.machine(DEVICE)["device"]
    print(f"{args.model}_mlp_only, {args.dtype}, {device}, times in us")
    print(timing.table(["error", "torch's", "eager", "torch", "graph", "torch", "GB/s"], [row]))


if __name__ == "__main__":
    main()
