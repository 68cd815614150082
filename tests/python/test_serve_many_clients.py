"""A thousand clients at once, good and bad: every text is that of the engine alone."""

import asyncio
import random
import statistics

import clusterfusion
import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from serve_load import leave_early, send_garbage, stream
from serving import raw_connection, serving, wait_for

CLIENTS = 1000
TOKENS = 16


def bodies() -> list[dict]:
    """Requests of one length and of many kinds."""
    rng = random.Random(5)
    made = []
    for seed in range(24):
        prompt = [rng.randrange(4096) for _ in range(rng.randrange(1, 40))]
        made.append(
            {
                "prompt": prompt,
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "stream": True,
                "seed": seed,
                "temperature": rng.choice([0, 0.8, 1.0]),
                "top_p": rng.choice([1.0, 0.9]),
            }
        )
    return made


def text_alone(engine: clusterfusion.Engine, body: dict) -> str:
    options = {"ignore_eos": True, "max_new_tokens": TOKENS}
    options |= {name: body[name] for name in ("seed", "temperature", "top_p")}
    return engine.generate(body["prompt"], **options).text


async def crowd(port: int, expected: list[tuple[dict, str]]) -> list[float]:
    """Seconds that each good client's request took, text checked; among them are bad clients."""

    async def good(number: int) -> float:
        body, text = expected[number % len(expected)]
        is_slow = number % 25 == 0
        outcome = await stream(port, body, pause=0.05 if is_slow else 0.0)
        assert outcome.texts == [text]
        assert outcome.tokens == TOKENS
        return outcome.whole

    async def bad(number: int) -> None:
        rng = random.Random(number)
        body, _ = expected[number % len(expected)]
        await asyncio.sleep(rng.random())
        if number % 2:
            await leave_early(port, body | {"max_tokens": 500}, rng)
        else:
            await send_garbage(port, rng)

    work = [good(number) for number in range(CLIENTS)]
    rest = asyncio.gather(*(bad(number) for number in range(CLIENTS // 10)))
    seconds = await asyncio.gather(*work)
    await rest
    return seconds


def test_a_thousand_clients(demo_model, tmp_path):
    engine = clusterfusion.Engine(demo_model)
    expected = [(body, text_alone(engine, body)) for body in bodies()]
    del engine
    with serving(demo_model, tmp_path, "--body-timeout", 10, "--threads", 1) as server:
        half_open = [raw_connection(server.port) for _ in range(50)]
        asyncio.run(crowd(server.port, expected))
        wait_for(lambda: server.running() == 0)
        memory, sockets = server.memory(), server.num_sockets()
        seconds = asyncio.run(crowd(server.port, expected))
        assert max(seconds) <= 2 * statistics.median(seconds)
        wait_for(lambda: server.running() == 0, 10)
        wait_for(lambda: server.num_sockets() <= sockets, 20)
        assert server.memory() - memory < 30 << 20
        for connection in half_open:
            connection.close()
        statuses = {line["status"] for line in server.lines()}
        assert statuses <= {200, 499}, statuses
        assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1
