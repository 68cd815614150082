"""Time the layer call over pages, with fewer heads of keys and values, and with several rows.

Each beside the plain call on the same weights, in turns in one run. Each layer has weights and
caches of its own, so nothing of it is found in the cache when its turn comes again.
On a GPU all layers are one CUDA graph; on the CPU the calls run eagerly. Prints a table on stderr
and writes JSON (docs/testing.md says what is in it):

    python benchmarks/layer_options.py --output benchmarks/results/layer_options_h200.json

Needs torch. `--model tiny` checks the program itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clusterfusion import ops

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import layer_timing as timing
import torch_layer
from layer_calls import CONTEXTS, MODELS, layers_that_fit, spread
from torch_layer import Sizes, Tensors

PAGE_SIZES = (16, 64)
ROWS = (4, 16)


@dataclass(frozen=True)
class Case:
    """A call on a layer's tensors, and the bytes that it must read."""

    name: str
    step: Callable[[Tensors], object]
    bytes_read: int


def paged(t: Tensors, sizes: Sizes, rows: int, positions: int, page_size: int, seed: int) -> None:
    """Add a cache in pages for so many rows of so many positions, which lie anywhere in it."""
    device, heads = t["input"].device, sizes.num_heads
    width = -(-positions // page_size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows * width, generator=generator).to(torch.int32)
    shape = (rows * width, 2, page_size, heads, sizes.head_dim)
    name = f"{rows} rows, pages of {page_size}"
    t[f"{name}: cache"] = torch.randn(shape, device=device, dtype=torch.float32).to(
        t["input"].dtype
    )
    t[f"{name}: table"] = order.view(rows, width).to(device)
    for each in ("input", "cos", "sin") if rows > 1 else ():
        t[f"{name}: {each}"] = t[each].expand(rows, -1).contiguous()


def random_layers(sizes: Sizes, args: argparse.Namespace) -> list[Tensors]:
    """Draw layers with all the caches that the cases need."""
    positions, dtype = max(args.contexts) + 1, getattr(torch, args.dtype)
    caches = (1 + len(PAGE_SIZES) + sum(ROWS)) * positions
    layers = []
    for seed in range(layers_that_fit(sizes, caches, args.layers, args.device)):
        t = torch_layer.random_tensors(sizes, dtype, args.device, positions, seed)
        for page_size in PAGE_SIZES:
            paged(t, sizes, 1, positions, page_size, seed)
        for rows in ROWS:
            paged(t, sizes, rows, positions, PAGE_SIZES[0], seed)
        layers.append(t)
    return layers


def call(t: Tensors, sizes: Sizes, context: int, **changed: Any) -> object:
    """Run the layer with other tensors or options than the plain call has."""
    names = list(t)[:17]
    tensors = {name: changed.pop(name, t[name]) for name in names}
    options = {"num_heads": sizes.num_heads, "rotary_dim": sizes.rotary_dim} | changed
    if "block_table" not in options:
        options["positions"] = context
    return ops.decoder_layer(*tensors.values(), **options)


def call_on_pages(t: Tensors, sizes: Sizes, context: int, rows: int, page_size: int) -> object:
    """Run the layer for rows that all have so many positions behind them."""
    name = f"{rows} rows, pages of {page_size}"
    cache = t[f"{name}: cache"]
    many = ("input", "cos", "sin") if rows > 1 else ()
    changed = {each: t[f"{name}: {each}"] for each in many}
    return call(
        t,
        sizes,
        context,
        **changed,
        k_cache=cache[:, 0],
        v_cache=cache[:, 1],
        block_table=t[f"{name}: table"],
        positions=context,
    )


def call_multi_query(t: Tensors, sizes: Sizes, context: int, kv_heads: int) -> object:
    """Run the layer with fewer heads of keys and values, on the first rows of the same tensors."""
    rows, width = (sizes.num_heads + 2 * kv_heads) * sizes.head_dim, kv_heads * sizes.head_dim
    caches = {n: t[n].view(-1)[: t[n].shape[0] * width] for n in ("k_cache", "v_cache")}
    return call(
        t,
        sizes,
        context,
        weight_qkv=t["weight_qkv"][:rows],
        bias_qkv=t["bias_qkv"][:rows],
        num_kv_heads=kv_heads,
        **{n: cache.view(-1, width) for n, cache in caches.items()},
    )


def cases_of(sizes: Sizes, context: int) -> list[Case]:
    """Give the plain call, then the others."""
    weights = sizes.bytes_of_attention_and_up + sizes.bytes_of_down
    cache = sizes.bytes_of_cache(context)
    cases = [Case("plain", lambda t: call(t, sizes, context), weights + cache)]
    for page_size in PAGE_SIZES:
        cases.append(
            Case(
                f"pages of {page_size}",
                lambda t, s=page_size: call_on_pages(t, sizes, context, 1, s),
                weights + cache,
            )
        )
    groups = {"multi-query": 1, "groups of 4": sizes.num_heads // 4}
    for name, kv_heads in groups.items():
        fewer = max(1, kv_heads)
        missing = 1 - fewer / sizes.num_heads
        cases.append(
            Case(
                name,
                lambda t, k=fewer: call_multi_query(t, sizes, context, k),
                weights - int(2 * 2 * sizes.hidden**2 * missing) + cache * fewer // sizes.num_heads,
            )
        )
    for rows in ROWS:
        cases.append(
            Case(
                f"{rows} rows, pages of {PAGE_SIZES[0]}",
                lambda t, r=rows: call_on_pages(t, sizes, context, r, PAGE_SIZES[0]),
                weights + rows * cache,
            )
        )
    return cases


def measure(
    sizes: Sizes, layers: list[Tensors], context: int, ceiling: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all cases in turns at one context."""
    cases = cases_of(sizes, context)
    steps = [[lambda t=t, c=case: c.step(t) for t in layers] for case in cases]
    if args.device.type == "cuda":
        runs = [timing.capture(side).replay for side in steps]
    else:
        runs = [timing.all_of(side) for side in steps]
    times = timing.alternating_seconds(runs, args.device, args.rounds, behind=True)
    found = [spread(seconds, len(layers)) for seconds in times]
    return [
        {
            "case": case.name,
            "context": context,
            "bytes_read": case.bytes_read,
            "times_plain": of_case["us"] / found[0]["us"],
            "share_of_ceiling": case.bytes_read / ceiling / (of_case["us"] * 1e-6),
        }
        | of_case
        for case, of_case in zip(cases, found, strict=True)
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Show what was measured."""
    cells = [
        [
            *(row["case"], row["context"]),
            *(f"{row[key]:.1f}" for key in ("us", "low", "high")),
            f"{row['times_plain']:.3f}",
            f"{row['share_of_ceiling']:.1%}",
        ]
        for row in rows
    ]
    head = ["case", "context", "us", "low", "high", "times plain", "ceiling"]
    print(timing.table(head, cells), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="pythia_2b8")
    timing.add_layer_arguments(parser, rounds=50)
    timing.add_result_arguments(parser, CONTEXTS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    ceiling = timing.ceiling_of(args)
    sizes = MODELS[args.model]
    layers = random_layers(sizes, args)
    rows = [
        row
        for context in args.contexts
        for row in measure(sizes, layers, context, ceiling["bytes_per_second"], args)
    ]
    print_table(rows)
    return {
        **timing.conditions(args),
        "ceiling": ceiling,
        "model": args.model,
        "layers": len(layers),
        "cases": rows,
    }


def main() -> None:
    """Measure, and write what was found."""
    args = parse_arguments()
    with torch.inference_mode():
        timing.write_result(run(args), args.output)


if __name__ == "__main__":
    main()
