"""What a layer call costs from Python: time of the calling thread on a layer of almost no size.

The measure is torch.add with a new result, in the same run. On a GPU the work is only enqueued; on
the CPU the time includes computing that layer, so there the call is timed without it as well.
Prints one JSON object, and to stderr how many times a torch.add each call takes.

    python benchmarks/call_overhead.py --output benchmarks/results/call_overhead_h100.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clusterfusion import _layer_calls, ops
from clusterfusion.pythia import LayerSizes, layer_calls

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import layer_timing as timing
import torch_layer

SIZES = torch_layer.TINY
# Fewer than the launches that wait in a GPU's queue: behind these the thread would be held up.
CALLS = 200
ROUNDS = 200
ADD = "torch.add"
WARM_UP_SECONDS = 1.0


def caller(function: Callable[..., object], *given: object, **options: object) -> Any:
    """A call whose arguments are variables, as users have them: unpacking a list costs time too."""
    names = [f"argument_{i}" for i in range(len(given))]
    passed = ", ".join([*names, *(f"{name}={name}" for name in options)])
    make = eval(f"lambda function, {', '.join([*names, *options])}: lambda: function({passed})")
    return make(function, *given, **options)


def move_to_quietest_cpu(cpus: set[int]) -> None:
    """Keeps this thread on the CPU that is fastest now: others may use a core's other half."""
    times = {}
    for cpu in cpus:
        os.sched_setaffinity(0, {cpu})
        times[cpu] = min(timeit.repeat("sum(range(5000))", number=2, repeat=5))
    os.sched_setaffinity(0, {min(times, key=times.__getitem__)})


def microseconds(
    calls: dict[str, Callable[[], object]], device: torch.device
) -> dict[str, dict[str, float]]:
    """Time the calling thread for each call, in turns: what slows a host down meets them all.

    The thread waits for a GPU only between rounds.
    """
    cpus = os.sched_getaffinity(0)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for _ in range(ROUNDS):
            if device.type == "cuda":
                move_to_quietest_cpu(cpus)
                for call in [*calls.values()] * 10:  # whose caches are cold
                    call()
            for name, call in calls.items():
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                rounds[name].append((time.thread_time() - start) / CALLS * 1e6)
                if device.type == "cuda":
                    torch.cuda.synchronize()
    finally:
        os.sched_setaffinity(0, cpus)
    return {
        name: {
            "median": statistics.median(times),
            "quarter": statistics.quantiles(times, n=4)[0],  # the fastest quarter took less
            "smallest": min(times),
        }
        for name, times in rounds.items()
    }


def without_computing(call: _layer_calls.LayerCall) -> _layer_calls.LayerCall:
    """The same call, whose tensors are taken and checked, and not computed with."""
    native, results = call.native, len(call.results)
    return call._replace(native=lambda *arguments: native(*arguments[:-results]))


def measure(device: torch.device) -> dict[str, dict[str, float]]:
    """Time the calls with new results, with given ones, by torch's dispatcher, and their parts."""
    tensors = torch_layer.random_tensors(SIZES, torch.float16, device, 8)
    layer = tuple(tensors.values())
    options = {"num_heads": SIZES.num_heads, "rotary_dim": SIZES.rotary_dim}
    parts = ops.attention_mlp_up(*layer[:15], 3, **options)
    out = ops.decoder_layer(*layer, 3, **options)
    operator = torch.ops.clusterfusion.decoder_layer
    settings = (3, None, *options.values(), 1e-5, "gelu", False, 0, 0)
    whole, plain = _layer_calls.DECODER_LAYER, (3, *settings[2:])
    checked = without_computing(whole)
    down = (layer[0], *parts[:2], *layer[15:])
    one = ops.mlp_down(*down)
    sizes = LayerSizes(SIZES.hidden, SIZES.intermediate, SIZES.num_heads, SIZES.rotary_dim)
    named = layer_calls("tiny", sizes)
    calls: dict[str, Callable[[], object]] = {
        "decoder_layer": caller(ops.decoder_layer, *layer, 3, **options),
        "decoder_layer, out": caller(ops.decoder_layer, *layer, 3, **options, out=out),
        "attention_mlp_up": caller(ops.attention_mlp_up, *layer[:15], 3, **options),
        "attention_mlp_up, out": caller(ops.attention_mlp_up, *layer[:15], 3, **options, out=parts),
        "mlp_down": caller(ops.mlp_down, *down),
        "mlp_down, out": caller(ops.mlp_down, *down, out=one),
        # As pythia_2b8_decoder_layer and its siblings.
        "a model's decoder_layer": caller(named.decoder_layer, *layer, 3),
        "a model's attention_only": caller(named.attention_only, *layer[:15], 3),
        "a model's mlp_only": caller(named.mlp_only, *down),
        "decoder_layer by torch's dispatcher": lambda: operator(*layer, *settings),
        "decoder_layer, not computed": lambda: _layer_calls.make_call(checked, layer, plain, None),
        "decoder_layer, out, not computed": lambda: _layer_calls.make_call(
            checked, layer, plain, out
        ),
        "decoder_layer, its three results": lambda: whole.allocate(
            layer[0].new_empty, layer, plain
        ),
        "decoder_layer, arguments taken and checked": lambda: whole.native(*layer, *plain),
        "decoder_layer, the library's call": lambda: whole.native(*layer, *plain, *out),
        "one empty tensor of torch": lambda: layer[0].new_empty(1, SIZES.hidden),
        ADD: lambda: torch.add(down[0], down[1]),
        "torch.add, out": lambda: torch.add(down[0], down[1], out=one),
        "nothing": lambda: None,
    }
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        calls["decoder_layer"]()
    return microseconds(calls, device)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=timing.default_device())
    timing.add_output_argument(parser)
    args = parser.parse_args()
    with torch.inference_mode():
        times = measure(args.device)
    result = {"machine": timing.machine(args.device), "microseconds_per_call": times}
    for name, found in times.items():
        share = found["median"] / times[ADD]["median"]
        print(f"{found['median']:7.2f} µs  {share:5.2f} x torch.add  {name}", file=sys.stderr)
    timing.write_result(result, args.output)


if __name__ == "__main__":
    main()
