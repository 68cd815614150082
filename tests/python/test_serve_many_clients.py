"""A thousand clients at once, good and bad: every text is that of the engine alone."""

import asyncio
import os

import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from serve_load import Process
from serve_soak import SERVER_OPTIONS, expected_texts, soak
from serving import raw_connection, serving, wait_for

CLIENTS = 1000
# Or longer, until each client has been answered twice; benchmarks/results/serving_soak_cpu.json is
# of ten minutes.
SECONDS = float(os.environ.get("CLUSTERFUSION_SOAK_SECONDS", 60))


def test_a_thousand_clients(demo_model, tmp_path):
    expected = expected_texts(demo_model)
    with serving(demo_model, tmp_path, *SERVER_OPTIONS) as server:
        half_open = [raw_connection(server.port) for _ in range(50)]
        process = Process(server.process.pid, server.port)
        seen = asyncio.run(soak(process, expected, CLIENTS, SECONDS))
        assert seen.wrong == [] and seen.failed == []
        assert min(map(len, seen.seconds)) >= 2, "a client was not answered twice"
        assert set(seen.bad) == {"left early", "sent garbage", "said nothing"}
        assert seen.unfairness <= 2
        assert seen.growth < 30 << 20
        wait_for(lambda: server.running() == 0)
        assert seen.sockets_after <= seen.sockets_before
        for connection in half_open:
            connection.close()
        statuses = {line["status"] for line in server.lines()}
        assert statuses <= {200, 499}, statuses
        assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1
