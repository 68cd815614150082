"""Attention and MLP-up in one call beside PyTorch.

As a script it checks and times the call against PyTorch, on the GPU if there is one, and prints a
table: python tests/test_attention_only.py --help. Under pytest the same checks are tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import clusterfusion  # noqa: E402
import layer_timing as timing  # noqa: E402
import torch_layer  # noqa: E402
from torch_layer import MODELS, Sizes, Tensors, relative_error  # noqa: E402

CONTEXTS = (0, 1, 63, 64, 65, 1000, 2047)
MAX_SEQ_LEN = 2048
NAMES = ("attn_output", "mlp_intermediate", "k_new", "v_new")
DEVICE = timing.default_device()
# The time of a test on the CPU is that of PyTorch in float64.
CASES = torch_layer.tested_layers(
    ["pythia_2b8", "pythia_6b9"] if DEVICE.type == "cuda" else ["pythia_2b8"]
)


def attention_only(model: str, tensors: Tensors, position: Any) -> tuple[torch.Tensor, ...]:
    function = getattr(clusterfusion, f"{model}_attention_only")
    return function(*list(tensors.values())[:15], position)


@dataclass
class Errors:
    """Relative errors against float64, by result."""

    ours: list[float]
    torch: list[float]


def errors(model: str, tensors: Tensors, wide: Tensors, position: int) -> Errors:
    sizes = MODELS[model]
    reference = torch_layer.attention_mlp_up(wide, sizes, position)
    theirs = torch_layer.attention_mlp_up(tensors, sizes, position)
    ours = attention_only(model, tensors, position)
    return Errors(
        [relative_error(o, r) for o, r in zip(ours, reference, strict=True)],
        [relative_error(t, r) for t, r in zip(theirs, reference, strict=True)],
    )


# ---- tests ----


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[str, Tensors, Tensors]]:
    model, dtype, heavy_tailed = request.param
    with torch.inference_mode():
        tensors = torch_layer.random_tensors(
            MODELS[model], getattr(torch, dtype), DEVICE, MAX_SEQ_LEN, heavy_tailed=heavy_tailed
        )
        yield model, tensors, torch_layer.widened(tensors)


@pytest.mark.parametrize("position", CONTEXTS)
def test_error_is_at_most_that_of_torch(layer, position):
    model, tensors, wide = layer
    with torch.inference_mode():
        found = errors(model, tensors, wide, position)
    for name, ours, theirs in zip(NAMES, found.ours, found.torch, strict=True):
        # Where both are one rounding away from float64, a tie may fall either way.
        assert ours <= 1.01 * theirs, name


def test_one_bit_pattern(layer):
    model, tensors, _ = layer
    with torch.inference_mode():
        expected = attention_only(model, tensors, 1000)
        for _ in range(10_000 if DEVICE.type == "cuda" else 5):
            results = attention_only(model, tensors, 1000)
            assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_one_graph_serves_every_position(layer):
    model, tensors, _ = layer
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    results = []
    with torch.inference_mode():
        graph = timing.capture([lambda: results.append(attention_only(model, tensors, position))])
        for value in CONTEXTS:
            position.fill_(value)
            graph.replay()
            expected = attention_only(model, tensors, value)
            assert all(torch.equal(r, e) for r, e in zip(results[-1], expected, strict=True))


# ---- script ----


def bytes_read(sizes: Sizes, position: int) -> int:
    return sizes.bytes_of_attention_and_up + sizes.bytes_of_cache(position)


def row(model: str, layers: list[Tensors], wide: Tensors, position: int, args: Any) -> list[str]:
    sizes = MODELS[model]
    found = errors(model, layers[0], wide, position)
    ours = [lambda t=t: attention_only(model, t, position) for t in layers]
    theirs = [lambda t=t: torch_layer.attention_mlp_up(t, sizes, position) for t in layers]
    times = [
        function(steps, DEVICE, args.rounds)
        for function in (timing.eager_seconds, timing.graph_seconds)
        for steps in (ours, theirs)
    ]
    best = times[2] or times[0]
    return [
        str(position),
        *(f"{max(e):.2e}" for e in (found.ours, found.torch)),
        *map(timing.microseconds, times),
        f"{bytes_read(sizes, position) / best / 1e9:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="pythia_2b8")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 128, 1000, 2047])
    timing.add_layer_arguments(parser, rounds=20)
    args = parser.parse_args()
    with torch.inference_mode():
        layers = [
            torch_layer.random_tensors(
                MODELS[args.model], getattr(torch, args.dtype), DEVICE, MAX_SEQ_LEN, seed
            )
            for seed in range(args.layers)
        ]
        wide = torch_layer.widened(layers[0])
        rows = [row(args.model, layers, wide, position, args) for position in args.contexts]
    device = timing.machine(DEVICE)["device"]
    print(f"{args.model}_attention_only, {args.dtype}, {device}, times in us")
    head = ["context", "error", "torch's", "eager", "torch", "graph", "torch", "GB/s"]
    print(timing.table(head, rows))


if __name__ == "__main__":
    main()
