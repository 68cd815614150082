"""Time to the first token and time a token through the server, beside the engine's own.

    python benchmarks/serve_latency.py --model DIR --clients 1 8 32 64 --output FILE

For each number of clients, so many streams at once: all ask at the same moment, and again when all
have ended. The engine's own figures are its statistics of the same prompts in one call of
Engine.generate(), in a process that has ended before the server starts. Prompts are random tokens,
no two alike; texts are greedy and go on to --new-tokens. A stream's time a token is that between
its first and its last token, shared by those behind the first. The median and the 95th percentile
are over all streams; a first round does not count. Texts are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import operator
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from serve_load import Answer, commit, fetch, serving

_LEAST_STREAMS = 20  # behind each percentile
_VOCABULARY = 1000  # that prompts are drawn from

Row = dict[str, Any]


def main() -> None:
    """Measures, and writes JSON."""
    options = _parser().parse_args()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as apart:
        device, alone = apart.submit(measure_engine, options).result()
    arguments = ["--device", options.device, "--no-prefix-cache"]
    with serving(options.model, *arguments) as server:
        served = [measure_server(server.port, clients, options) for clients in options.clients]
    result = {
        "what": f"streams of {options.prompt_tokens} + {options.new_tokens} tokens through the "
        "server beside the engine's own statistics of the same prompts; median and 95th percentile",
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or commit(),
        "command": shlex.join(["serve_latency.py", *sys.argv[1:]]),
        "model": options.name or options.model.resolve().name,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rows": [
            {
                "clients": clients,
                "streams": len(texts),
                "texts_that_differ": sum(map(operator.ne, texts, own_texts)),
                "server": server,
                "engine": engine,
            }
            for clients, (texts, server), (own_texts, engine) in zip(
                options.clients, served, alone, strict=True
            )
        ],
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    add("--clients", type=int, nargs="+", default=[1, 8, 32, 64], help="streams at once")
    add("--prompt-tokens", type=int, default=128, help="of each prompt (128)")
    add("--new-tokens", type=int, default=128, help="of each text (128)")
    add("--rounds", type=int, default=5, help="rounds that count, at least (5)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(auto)")
    add("--name", help="of the model in the result (the folder's)")
    add("--commit", help="in the result (git's HEAD)")
    add("--output", type=Path, metavar="FILE", help="JSON (standard output)")
    return parser


def rounds_of(clients: int, options: argparse.Namespace) -> Iterator[list[list[int]]]:
    """Prompts of each round, the same for server and engine; the first one is the warm-up's."""
    rng = random.Random(clients)
    for _ in range(1 + max(options.rounds, -(-_LEAST_STREAMS // clients))):
        yield [
            [rng.randrange(_VOCABULARY) for _ in range(options.prompt_tokens)]
            for _ in range(clients)
        ]


def measure_engine(options: argparse.Namespace) -> tuple[str, list[tuple[list[str], Row]]]:
    """The device, and for each number of clients the texts and the engine's figures."""
    import clusterfusion

    engine = clusterfusion.Engine(
        options.model, options.device, mode="throughput", prefix_cache=False
    )
    rows = []
    for clients in options.clients:
        texts: list[str] = []
        firsts, betweens, seconds = [], [], 0.0
        for number, prompts in enumerate(rounds_of(clients, options)):
            began = time.perf_counter()
            results = engine.generate(
                prompts, max_new_tokens=options.new_tokens, ignore_eos=True, temperature=0
            )
            if number == 0:
                continue
            seconds += time.perf_counter() - began
            if any(len(one.tokens) != options.new_tokens for one in results):
                raise SystemExit("the model has no room for so many tokens: ask for fewer")
            texts += [one.text for one in results]
            firsts += [one.statistics.time_to_first_token_seconds for one in results]
            betweens += [one.statistics.seconds_per_token for one in results]
        speed = options.new_tokens * len(texts) / seconds
        rows.append((texts, figures(firsts, betweens, speed)))
    return engine.info.device_description, rows


def measure_server(port: int, clients: int, options: argparse.Namespace) -> tuple[list[str], Row]:
    """The texts, and the server's figures."""
    answers: list[Answer] = []
    seconds = 0.0
    for number, prompts in enumerate(rounds_of(clients, options)):
        began = time.perf_counter()
        found = asyncio.run(_ask_all(port, prompts, options.new_tokens))
        if number > 0:
            seconds += time.perf_counter() - began
            answers += found
    outcomes = [answer.outcome() for answer in answers]
    firsts = [one.first for one in outcomes]
    betweens = [(one.whole - one.first) / max(options.new_tokens - 1, 1) for one in outcomes]
    speed = options.new_tokens * len(outcomes) / seconds
    return [text for one in outcomes for text in one.texts], figures(firsts, betweens, speed)


async def _ask_all(port: int, prompts: list[list[int]], new_tokens: int) -> list[Answer]:
    body = {"max_tokens": new_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    return await asyncio.gather(*(fetch(port, {"prompt": one, **body}) for one in prompts))


def figures(firsts: list[float], betweens: list[float], tokens_per_second: float) -> Row:
    """Milliseconds from seconds of each stream."""

    def both(seconds: list[float], digits: int) -> dict[str, float]:
        spread = (
            statistics.median(seconds),
            statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        )
        return {
            name: round(value * 1e3, digits)
            for name, value in zip(("median", "p95"), spread, strict=True)
        }

    return {
        "first_token_ms": both(firsts, 2),
        "per_token_ms": both(betweens, 3),
        "tokens_per_second": round(tokens_per_second, 1),
    }


if __name__ == "__main__":
    main()
