"""What steering and ablation cost a token: decode steps with them and without, in turns.

    python benchmarks/steering_cost.py FOLDER [--device cuda] [--mode latency]

Prints one JSON object: the median over the rounds of each, and its share of the plain one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack, nullcontext

import clusterfusion
import numpy as np


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mode", default="latency")
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    engine = clusterfusion.Engine(arguments.folder, arguments.device, mode=arguments.mode)
    layers = range(engine.config.num_layers)
    vector = np.full(engine.config.hidden_size, 1e-3, np.float32)
    ways = {
        "plain": nullcontext,
        "steered": lambda: engine.steer(dict.fromkeys(layers, vector)),
        "ablated": lambda: engine.ablate(heads={layer: [0] for layer in layers}, mlps=[0]),
    }

    def seconds_per_token() -> float:
        result = engine.generate([1, 2, 3], max_new_tokens=arguments.tokens, ignore_eos=True)
        return result.statistics.seconds_per_token

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            with ExitStack() as stack:
                stack.enter_context(way())
                seconds[name].append(seconds_per_token())
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "device": engine.info.device_description,
                "model": engine.info.path,
                "mode": arguments.mode,
                "microseconds_per_token": {k: round(v * 1e6, 2) for k, v in medians.items()},
                "of_plain": {k: round(v / medians["plain"], 4) for k, v in medians.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
