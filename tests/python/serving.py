"""Servers for tests: a process of its own, as a user would start it, and plain sockets to it."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serve_load import Process

# For what must come, but may take its time on a busy machine.
PATIENCE_SECONDS = 300


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen
    log: Path
    port: int
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def complete(self, **body: Any) -> dict:
        """The answer to a request for completions, which must succeed."""
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def lines(self) -> list[dict]:
        """What the server has logged in JSON."""
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                found.append(json.loads(line))
        return found

    def line_of(self, request_id: str) -> dict:
        """The log line of a request, which may come a moment after its answer."""
        return wait_for(
            lambda: next((line for line in self.lines() if line["id"] == request_id), None)
        )

    def figures(self) -> dict[str, float]:
        """What /metrics tells, by name with labels."""
        found = {}
        for line in self.client.get("/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name] = float(value)
        return found

    def running(self) -> float:
        """Texts that the engine computes or that wait for it."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(value for name, value in self.figures().items() if name.startswith(names))

    @property
    def resources(self) -> Process:
        """What the process takes."""
        return Process(self.process.pid, self.port)


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: object) -> Iterator[Served]:
    """Starts a server on a free port, and ends it; its log is in `folder`."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "clusterfusion.serve", model, "--port", 0, "--log-json"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*map(str, command), *map(str, options)], stderr=errors, stdout=errors
        )
    try:
        yield Served(process, log, _port(process, log))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        print(log.read_text()[-4000:])
    assert process.returncode in (-signal.SIGTERM, 130), log.read_text()[-4000:]
    assert "Traceback" not in log.read_text()


def _port(process: subprocess.Popen, log: Path) -> int:
    def find() -> int | None:
        assert process.poll() is None, log.read_text()
        found = re.search(r"^serving .* on http://\S+:(\d+)$", log.read_text(), re.MULTILINE)
        return int(found.group(1)) if found else None

    port = wait_for(find)
    wait_for(lambda: _accepts(port))
    return port


def _accepts(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_SECONDS).status_code
            == 200
        )
    except httpx.TransportError:
        return False


def wait_for(find: Any, seconds: float = PATIENCE_SECONDS) -> Any:
    """Calls `find` until it gives something true."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end, f"it did not come within {seconds} s"
        time.sleep(0.02)
    return found


def raw_connection(port: int, receive_buffer: int | None = None) -> socket.socket:
    """A plain connection to a server."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(("127.0.0.1", port))
    return connection


def request_bytes(path: str, body: bytes, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def events_of(stream: bytes | str) -> list[dict]:
    """The JSON of each event of a stream that ended as it should."""
    text = stream.decode() if isinstance(stream, bytes) else stream
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
