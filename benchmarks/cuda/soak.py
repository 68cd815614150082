"""Generate a great many tokens in one process, and see that nothing changes with time.

Ten rounds of the same requests, of unlike lengths and settings, in another order each time, with
several texts in the making at once and some of them given up halfway. The texts must be the same
to the last token in every round and in a fresh process that makes them one by one; the first and
the last tenth must take the same time a token; neither GPU nor host memory may grow. Prints one
JSON document; exits with 1 if one of these does not hold.

    python benchmarks/cuda/soak.py models/demo --tokens 200000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field

from clusterfusion import Engine, Stream

ROUNDS = 10
LIVE_STREAMS = 4
# Allocators keep some; a leak of a KB a token would be six times as much.
ALLOWED_HOST_GROWTH = 32 << 20


@dataclass(frozen=True)
class Request:
    """One text to be made."""

    number: int
    prompt: list[int]
    new_tokens: int
    pulled_tokens: int  # fewer than new_tokens: the text is given up after these
    options: dict


@dataclass
class Round:
    """What one round came to."""

    tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0
    seconds: float = 0
    gpu_bytes: int | None = None
    host_bytes: int = 0
    digests: dict[int, str] = field(default_factory=dict)

    def add(self, request: Request, stream: Stream) -> None:
        """Takes in a finished or given-up text."""
        (result,) = stream.results
        tokens = result.tokens[: request.pulled_tokens]
        self.digests[request.number] = hashlib.sha256(repr(tokens).encode()).hexdigest()
        self.tokens += len(result.tokens)
        self.decode_steps += max(len(result.tokens) - 1, 0)
        self.decode_seconds += result.statistics.decode_seconds

    @property
    def ms_per_token(self) -> float:
        """Time of decode steps alone."""
        return 1e3 * self.decode_seconds / self.decode_steps


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=200_000, help="in all rounds together")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    parser.add_argument("--allowed-drift", type=float, default=0.05, help="of the time a token")
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_requests(engine: Engine, tokens: int, seed: int) -> list[Request]:
    """Requests that come to about this many new tokens."""
    source, requests = random.Random(seed), []
    longest, vocab = engine.info.max_positions, engine.config.vocab_size
    settings = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1},
    ]
    while tokens > 0:
        number = len(requests)
        prompt = [source.randrange(vocab) for _ in range(int(1.6 ** source.uniform(0, 13)) + 1)]
        prompt = prompt[: longest // 2]
        new_tokens = min(source.randint(1, longest // 2), tokens)
        pulled = max(1, new_tokens // 2) if number % 10 == 9 else new_tokens
        # Greedy and plain temperature, which stay on the GPU, most of the time.
        options = settings[min(number % 10, 3) if number % 10 < 4 else number % 2]
        requests.append(Request(number, prompt, new_tokens, pulled, options))
        tokens -= pulled
    return requests


def start(engine: Engine, request: Request) -> Stream:
    """Begins a text."""
    return engine.stream(
        request.prompt,
        max_new_tokens=request.new_tokens,
        seed=request.number,
        ignore_eos=True,
        **request.options,
    )


def pull(stream: Stream, request: Request, done: int, count: int) -> int:
    """Takes up to `count` more tokens of a text; returns how many there are then."""
    for event in stream:
        done += event.token is not None
        count -= 1
        if done >= request.pulled_tokens:
            stream.close()
            break
        if count <= 0:
            break
    return done


def run_round(engine: Engine, requests: list[Request], live: int, source: random.Random) -> Round:
    """Makes all texts, `live` of them at a time, in turns of random length."""
    result, waiting = Round(), list(requests)
    running: list[tuple[Request, Stream, int]] = []
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < live:
            request = waiting.pop(0)
            running.append((request, start(engine, request), 0))
        request, stream, done = running.pop(source.randrange(len(running)))
        done = pull(stream, request, done, source.randint(1, 100))
        if done < request.pulled_tokens:
            running.append((request, stream, done))
        else:
            result.add(request, stream)
    result.seconds = time.perf_counter() - begin
    return result


def host_bytes() -> int:
    """Resident memory of this process that is no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def gpu_bytes() -> int | None:
    """Memory in use on the GPU; None where there is none to ask."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) << 20


def warm_up(engine: Engine) -> None:
    """Brings the pool of KV pages to its largest."""
    longest = engine.info.max_positions
    streams = [
        engine.stream([5] * (longest // 2), max_new_tokens=longest // 2, ignore_eos=True)
        for _ in range(LIVE_STREAMS + 1)
    ]
    for stream in streams:
        next(stream)
        stream.close()


def fresh_digests(arguments: argparse.Namespace) -> dict[int, str]:
    """The texts of a process of its own, made one by one."""
    command = [sys.executable, __file__, arguments.model, "--device", arguments.device]
    command += ["--tokens", str(arguments.tokens), "--seed", str(arguments.seed), "--one-by-one"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the fresh process failed:\n{done.stderr}")
    return {int(number): digest for number, digest in json.loads(done.stdout).items()}


def soak(engine: Engine, requests: list[Request], seed: int) -> list[Round]:
    """All rounds, with memory read after each."""
    warm_up(engine)
    rounds = []
    for number in range(ROUNDS):
        source = random.Random(1000 * seed + number)
        result = run_round(engine, source.sample(requests, len(requests)), LIVE_STREAMS, source)
        result.gpu_bytes, result.host_bytes = gpu_bytes(), host_bytes()
        rounds.append(result)
        print(
            f"round {number + 1} of {ROUNDS}: {result.tokens} tokens, {result.seconds:.1f} s, "
            f"{result.ms_per_token:.4f} ms a token",
            file=sys.stderr,
        )
    return rounds


def judge(rounds: list[Round], fresh: dict[int, str], allowed_drift: float) -> dict:
    """What changed, and what is wrong with it."""
    first, last = rounds[0], rounds[-1]
    drift = last.ms_per_token / first.ms_per_token - 1
    gpu_growth = None if first.gpu_bytes is None else last.gpu_bytes - first.gpu_bytes
    host_growth = last.host_bytes - first.host_bytes
    differing = [n for n, digest in fresh.items() if any(r.digests[n] != digest for r in rounds)]
    problems = []
    if differing or fresh.keys() != first.digests.keys():
        problems.append(f"texts differ from a fresh process's: requests {differing[:20]}")
    if abs(drift) > allowed_drift:
        problems.append(f"the time a token drifted by {drift:+.1%}")
    if gpu_growth:
        problems.append(f"GPU memory grew by {gpu_growth} bytes")
    if host_growth > ALLOWED_HOST_GROWTH:
        problems.append(f"host memory grew by {host_growth} bytes")
    return {
        "drift": drift,
        "gpu_growth_bytes": gpu_growth,
        "host_growth_bytes": host_growth,
        "differing_requests": len(differing),
        "problems": problems,
    }


def main() -> None:
    """Soak, compare and report."""
    arguments = parse_arguments()
    engine = Engine(arguments.model, device=arguments.device)
    requests = make_requests(engine, arguments.tokens // ROUNDS, arguments.seed)
    if arguments.one_by_one:
        json.dump(run_round(engine, requests, 1, random.Random(0)).digests, sys.stdout)
        return
    rounds = soak(engine, requests, arguments.seed)
    verdict = judge(rounds, fresh_digests(arguments), arguments.allowed_drift)
    report = {
        "device": engine.info.device_description,
        "model": arguments.model,
        "tokens": sum(r.tokens for r in rounds),
        "sequences": ROUNDS * len(requests),
        **verdict,
        "rounds": [
            {
                "tokens": r.tokens,
                "seconds": r.seconds,
                "ms_per_token": r.ms_per_token,
                "gpu_bytes": r.gpu_bytes,
                "host_bytes": r.host_bytes,
            }
            for r in rounds
        ],
    }
    print(json.dumps(report, indent=2))
    raise SystemExit(1 if verdict["problems"] else 0)


if __name__ == "__main__":
    main()
