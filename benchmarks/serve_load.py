"""Clients for a server's benchmark and test: plain sockets, so that they cost little themselves."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass


@dataclass
class Outcome:
    """What a client saw of one request; times are seconds since it was sent."""

    texts: list[str]
    tokens: int
    first: float
    whole: float


def request_bytes(body: dict) -> bytes:
    """A request for completions as it goes over the wire; the connection ends with the answer."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def stream(port: int, body: dict, *, pause: float = 0.0) -> Outcome:
    """Streams one request to its end.

    Args:
        port: Of a server on this machine.
        body: The request.
        pause: Seconds to wait after each piece that is read, as a slow reader does.

    Raises:
        ConnectionError: The answer is an error, or it ends in the middle.
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(body))
        parts = [await reader.read(1 << 16)]
        first = time.perf_counter() - began
        while part := await reader.read(1 << 16):
            parts.append(part)
            if pause:
                await asyncio.sleep(pause)
    finally:
        writer.close()
    whole = time.perf_counter() - began
    texts, tokens = _read(b"".join(parts), body.get("n", 1))
    return Outcome(texts, tokens, first, whole)


def _read(answer: bytes, n: int) -> tuple[list[str], int]:
    head, _, chunked = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(answer[:500].decode(errors="replace"))
    events = _unchunked(chunked).split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        raise ConnectionError(f"the stream ends with {events[-2:]}")
    texts = [""] * n
    for event in events[:-2]:
        choice = json.loads(event.removeprefix(b"data: "))["choices"][0]
        texts[choice["index"]] += choice["text"]
    return texts, len(events) - 2


def _unchunked(data: bytes) -> bytes:
    parts = []
    place = 0
    while place < len(data):
        end = data.index(b"\r\n", place)
        size = int(data[place:end], 16)
        parts.append(data[end + 2 : end + 2 + size])
        place = end + 4 + size
    return b"".join(parts)


async def leave_early(port: int, body: dict, rng: random.Random) -> None:
    """Asks, reads a little, perhaps, and goes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = request_bytes(body)
    writer.write(data[: rng.choice([len(data), len(data), len(data) // 2])])
    if rng.random() < 0.5:
        await asyncio.wait([asyncio.ensure_future(reader.read(100))], timeout=rng.random())
    writer.transport.abort()


async def send_garbage(port: int, rng: random.Random) -> None:
    """Sends what is no HTTP, and reads what comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n")
        await asyncio.wait_for(reader.read(1000), 60)
    except ConnectionError:
        pass  # also an answer
    finally:
        writer.close()
