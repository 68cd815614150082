"""A thousand streaming clients at once, good and bad ones, for as long as wanted.

    python benchmarks/serve_soak.py --model models/demo --seconds 600 --output FILE

Good clients ask again as soon as they are answered, and compare each text with that of the engine
alone; one in 25 reads slowly. Beside them, a tenth as many bad ones leave in the middle, send what
is no HTTP, or open a connection and say little or nothing, again and again. The result tells of
wrong texts, of times by client, and of the server's memory and sockets. Exit code 1 where a text
was wrong, a request failed, or the server did not get rid of its clients.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clusterfusion
from serve_load import Process, commit, leave_early, say_nothing, send_garbage, serving, stream

TOKENS = 16  # of each text
_SLOW_ONE_IN = 25
_SLOW_PAUSE = 0.05
_BAD_ONE_IN = 10
_SAMPLE_SECONDS = 1.0
SERVER_OPTIONS = ("--threads", 1, "--body-timeout", 10)

Body = dict[str, Any]


@dataclass
class Seen:
    """What was seen of a server and its clients."""

    seconds: list[list[float]] = field(default_factory=list)  # of each good client's requests
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)  # visits of bad clients by kind
    memory: list[int] = field(default_factory=list)  # bytes, each second
    sockets_before: int = 0
    sockets_after: int = 0

    @property
    def means(self) -> list[float]:
        """Each good client's time a request.

        Without first requests: all come at once, so one waits for nothing and another for all.
        """
        return [statistics.fmean(one[1:]) for one in self.seconds if len(one) > 1]

    @property
    def unfairness(self) -> float:
        """The slowest client's time a request over the median client's."""
        return max(self.means) / statistics.median(self.means)

    @property
    def growth(self) -> int:
        """Bytes of memory in the last quarter of the time beyond those of the second."""
        quarter = max(len(self.memory) // 4, 1)
        second, last = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return int(statistics.median(last) - statistics.median(second or last))


def expected_texts(model: object) -> list[tuple[Body, str]]:
    """Requests of one length and many kinds, and what the engine makes of each alone."""
    engine = clusterfusion.Engine(model)
    rng = random.Random(5)
    found = []
    for seed in range(24):
        prompt = [rng.randrange(4096) for _ in range(rng.randrange(1, 40))]
        options = {
            "ignore_eos": True,
            "seed": seed,
            "temperature": rng.choice([0, 0.8, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
        }
        text = engine.generate(prompt, max_new_tokens=TOKENS, **options).text
        found.append(({"prompt": prompt, "max_tokens": TOKENS, "stream": True, **options}, text))
    return found


async def soak(
    server: Process, expected: list[tuple[Body, str]], clients: int, seconds: float
) -> Seen:
    """Lets clients come for that many seconds, and waits until all of them are gone.

    Args:
        server: A server's process, with SERVER_OPTIONS.
        expected: Requests and their texts.
        clients: Good ones at once.
        seconds: After which no client begins a request, but for one that has had no two answers.
    """
    seen = Seen(sockets_before=server.num_sockets())
    end = time.monotonic() + seconds
    watch = asyncio.ensure_future(_watch(server, seen))
    good = [_good(server.port, number, expected, end, seen) for number in range(clients)]
    number_bad = clients // _BAD_ONE_IN
    bad = [_bad(server.port, number, expected, end, seen) for number in range(number_bad)]
    await asyncio.gather(*good, *bad)
    watch.cancel()
    for _ in range(40):
        seen.sockets_after = server.num_sockets()
        if seen.sockets_after <= seen.sockets_before:
            break
        await asyncio.sleep(0.5)
    return seen


async def _watch(server: Process, seen: Seen) -> None:
    while True:
        seen.memory.append(server.memory())
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _good(
    port: int, number: int, expected: list[tuple[Body, str]], end: float, seen: Seen
) -> None:
    pause = _SLOW_PAUSE if number % _SLOW_ONE_IN == 0 else 0.0
    took: list[float] = []
    seen.seconds.append(took)
    while time.monotonic() < end or len(took) < 2:
        body, text = expected[(number + len(took)) % len(expected)]
        try:
            outcome = await stream(port, body, pause=pause)
        except (OSError, ValueError) as error:
            seen.failed.append(f"{type(error).__name__}: {error}"[:300])
            return
        took.append(outcome.whole)
        if outcome.texts != [text] or outcome.tokens != TOKENS:
            seen.wrong.append(f"expected {text!r}, found {outcome.texts!r}")


async def _bad(
    port: int, number: int, expected: list[tuple[Body, str]], end: float, seen: Seen
) -> None:
    rng = random.Random(number)
    body, _ = expected[number % len(expected)]
    while time.monotonic() < end:
        await asyncio.sleep(rng.random())
        kind = rng.choice(["left early", "sent garbage", "said nothing"])
        if kind == "left early":
            await leave_early(port, body | {"max_tokens": 500}, rng)
        elif kind == "sent garbage":
            await send_garbage(port, rng)
        else:
            await say_nothing(port, rng)
        seen.bad[kind] = seen.bad.get(kind, 0) + 1


def report(seen: Seen, clients: int, seconds: float) -> dict[str, Any]:
    """What is kept of it, in JSON."""
    requests = [one for took in seen.seconds for one in took]
    every = max(len(seen.memory) // 20, 1)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(requests),
        "tokens_per_second": round(len(requests) * TOKENS / seconds, 1),
        "wrong_texts": len(seen.wrong),
        "failed_requests": len(seen.failed),
        "bad_clients": seen.bad,
        "request_seconds": {
            "median": round(statistics.median(requests), 2),
            "p95": round(statistics.quantiles(requests, n=20, method="inclusive")[-1], 2),
            "largest": round(max(requests), 2),
        },
        "client_seconds_a_request": {
            "median": round(statistics.median(seen.means), 2),
            "slowest": round(max(seen.means), 2),
            "slowest_over_median": round(seen.unfairness, 2),
        },
        "memory_mb": [round(one / 1e6, 1) for one in seen.memory[::every]],
        "memory_growth_mb": round(seen.growth / 1e6, 1),
        "sockets": {"before": seen.sockets_before, "after": seen.sockets_after},
    }


def main() -> int:
    """Runs it, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--clients", type=int, default=1000, help="good ones at once (1000)")
    parser.add_argument("--seconds", type=float, default=600, help="how long (600)")
    parser.add_argument("--remark", help="of the machine, in the result")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (standard output)")
    options = parser.parse_args()
    tree = commit()  # now, since it may change meanwhile
    expected = expected_texts(options.model)
    with serving(options.model, *SERVER_OPTIONS) as server:
        seen = asyncio.run(soak(server, expected, options.clients, options.seconds))
    for line in [*seen.wrong, *seen.failed][:10]:
        print(line, file=sys.stderr)
    result = {
        "what": f"streaming clients at once on loopback, {TOKENS} tokens a request, each text "
        "compared with the engine's alone; beside them clients that leave, send garbage or say "
        "nothing; server and clients on one machine",
        "device": clusterfusion.Engine(options.model, threads=1).info.device_description,
        "date": datetime.date.today().isoformat(),
        "commit": tree,
        "command": shlex.join(["serve_soak.py", *sys.argv[1:]]),
        "server": " ".join(map(str, SERVER_OPTIONS)),
        **({"remark": options.remark} if options.remark else {}),
        **report(seen, options.clients, options.seconds),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
    stayed = seen.sockets_after > seen.sockets_before
    return 1 if seen.wrong or seen.failed or stayed else 0


if __name__ == "__main__":
    sys.exit(main())
