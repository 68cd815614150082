"""What the server costs: tokens a second through it, beside those of the engine alone.

    python benchmarks/serve_throughput.py MODEL [--clients 1,8,64] [--tokens 128] [--rounds 3]
    python benchmarks/serve_throughput.py --free    # a model that costs next to nothing

Server and clients run on the same machine; --pin gives the server's process the first core and the
clients the second, which is what "on one core" means with --free. The engine's own figure is that
of the same requests in one call of Engine.generate(), in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serve_load import serving, stream

ROOT = Path(__file__).resolve().parents[1]
_ALONE = """
import json, sys, time
import clusterfusion
model, clients, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = clusterfusion.Engine(model, mode="throughput", max_sequences=max(clients, 1))
prompts = [[10 + i % 200] * 8 for i in range(clients)]
options = dict(max_new_tokens=tokens, ignore_eos=True, temperature=1.0, seed=1)
engine.generate(prompts, **options)
began, busy = time.perf_counter(), time.process_time()
engine.generate(prompts, **options)
seconds, cpu = time.perf_counter() - began, time.process_time() - busy
print(json.dumps([clients * tokens / seconds, cpu / (clients * tokens) * 1e6]))
"""


def main() -> None:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--free", action="store_true", help="a random model of 1 small layer")
    parser.add_argument("--clients", default="1,8,64", help="numbers of clients at once")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=3, help="the best of these counts")
    parser.add_argument("--pin", action="store_true", help="a core for each side")
    options = parser.parse_args()
    if (options.model is None) != options.free:
        parser.error("name a MODEL, or pass --free")
    with tempfile.TemporaryDirectory() as folder:
        model = free_model(Path(folder)) if options.free else options.model
        clients = [int(count) for count in options.clients.split(",")]
        rows = [measure(model, count, options) for count in clients]
    what = "random model of one layer of 16" if options.free else str(options.model)
    print(json.dumps({"model": what, "tokens": options.tokens, "rows": rows}, indent=1))


def free_model(folder: Path) -> str:
    """A checkpoint whose steps cost next to nothing."""
    sys.path.insert(0, str(ROOT / "tests/python"))
    from checkpoints import write_random_checkpoint

    return str(
        write_random_checkpoint(
            folder / "free",
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            vocab_size=320,
            max_positions=2048,
            tokenizer="train",
        )
    )


def measure(model: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """The server's figures with some clients at once, and the engine's."""
    alone, alone_cpu = max(engine_alone(model, clients, options) for _ in range(options.rounds))
    before = []
    if options.pin:
        before = ["taskset", "-c", "0"]
        os.sched_setaffinity(0, {1})
    with serving(model, before=before) as server:
        asyncio.run(load(server.port, clients, options))
        busy = server.cpu_seconds()
        rounds = [asyncio.run(load(server.port, clients, options)) for _ in range(options.rounds)]
        cpu = server.cpu_seconds() - busy
    best = max(rounds, key=lambda one: one["tokens_per_second"])
    served = sum(one["tokens"] for one in rounds)
    return {
        "clients": clients,
        **best,
        "engine_tokens_per_second": round(alone, 1),
        "share": round(best["tokens_per_second"] / alone, 3),
        "engine_cpu_us_per_token": round(alone_cpu, 1),
        "server_cpu_us_per_token": round(cpu / served * 1e6, 1),
    }


def engine_alone(model: str, clients: int, options: argparse.Namespace) -> list[float]:
    """Tokens a second without a server, and microseconds of processor time for each."""
    command = [sys.executable, "-c", _ALONE, model, str(clients), str(options.tokens)]
    if options.pin:
        command = ["taskset", "-c", "0", *command]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout)


async def load(port: int, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """All clients at once, one request each."""
    bodies = [
        {
            "prompt": [10 + i % 200] * 8,
            "max_tokens": options.tokens,
            "ignore_eos": True,
            "seed": 1,
            "stream": True,
        }
        for i in range(clients)
    ]
    began = time.perf_counter()
    outcomes = await asyncio.gather(*(stream(port, body) for body in bodies))
    seconds = time.perf_counter() - began
    tokens = sum(one.tokens for one in outcomes)
    between = [(one.whole - one.first) / max(one.tokens - 1, 1) for one in outcomes]
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_ms": round(statistics.median(one.first for one in outcomes) * 1e3, 2),
        "between_tokens_ms": round(statistics.median(between) * 1e3, 3),
    }


if __name__ == "__main__":
    main()
