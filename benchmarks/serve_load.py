"""A server, and clients for its benchmarks and test: plain sockets, so that they cost little."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@contextmanager
def serving(model: object, *options: object, before: Sequence[str] = ()) -> Iterator[Process]:
    """A server on a free port while the block runs.

    Args:
        model: What it serves.
        *options: More of its command line.
        before: What stands before that, as taskset and its options.

    Raises:
        SystemExit: It does not start; the message is its log.
    """
    command = [*before, sys.executable, "-m", "clusterfusion.serve", model, "--port", 0, *options]
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(list(map(str, command)), stderr=log)
        try:
            yield Process(server.pid, _port(server, Path(log.name)))
        finally:
            server.terminate()
            server.wait()


def _port(server: subprocess.Popen, log: Path) -> int:
    while "startup complete" not in log.read_text():
        if server.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.05)
    return int(re.search(r"on http://\S+:(\d+)", log.read_text()).group(1))


@dataclass(frozen=True)
class Process:
    """A server's process."""

    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """Processor time that it has taken, engine included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes that it has resident."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def num_sockets(self) -> int:
        """Its open sockets."""
        count = 0
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                count += str(path.readlink()).startswith("socket:")
        return count


def commit() -> str | None:
    """Of the tree that this file is in; None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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


@dataclass
class Answer:
    """An answer as it came, not yet looked at; times as in Outcome."""

    data: bytes
    first: float
    whole: float

    def outcome(self, n: int = 1) -> Outcome:
        """Reads the stream of `n` texts.

        Raises:
            ConnectionError: It is an error, or ends in the middle.
        """
        return Outcome(*_read(self.data, n), self.first, self.whole)


async def stream(port: int, body: dict, *, pause: float = 0.0) -> Outcome:
    """Streams one request to its end.

    Args:
        port: Of a server on this machine.
        body: The request.
        pause: Seconds to wait after each piece that is read, as a slow reader does.

    Raises:
        ConnectionError: The answer is an error, or it ends in the middle.
    """
    return (await fetch(port, body, pause=pause)).outcome(body.get("n", 1))


async def fetch(port: int, body: dict, *, pause: float = 0.0) -> Answer:
    """As stream(), but looks at nothing, so that other clients' times are right."""
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
    return Answer(b"".join(parts), first, time.perf_counter() - began)


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
        with suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(100), rng.random())
    writer.transport.abort()


async def say_nothing(port: int, rng: random.Random) -> None:
    """Connects, sends a part of a request's head, perhaps, and waits to be cut off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes({})[: rng.choice([0, 10, 60])])
        with suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(1000), rng.uniform(1, 60))
    finally:
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
