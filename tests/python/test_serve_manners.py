"""How the server meets crowds, slow and broken clients, signals and strangers."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clusterfusion
import httpx
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

import contextlib

from clusterfusion.serve.feed import EngineFeed
from clusterfusion.serve.record import Record
from serving import (
    PATIENCE_SECONDS,
    Served,
    events_of,
    raw_connection,
    request_bytes,
    serving,
    wait_for,
)

PROMPT = "It was a cold evening in November"
SHORT = {"prompt": PROMPT, "max_tokens": 1}
LONG = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "seed": 1}
# Work that was cut ends long before, even on a busy machine.
SOON_SECONDS = 30


def long_body(**more) -> bytes:
    """Seconds of work: 24 texts of 1000 tokens."""
    return json.dumps({**LONG, "n": 24, **more}).encode()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_full_queue_is_told(demo_model, tmp_path):
    options = ["--max-sequences", 1, "--max-waiting", 1]
    with serving(demo_model, tmp_path, *options) as server:
        ended = threading.Event()

        def occupy() -> int:
            body = {**LONG, "max_tokens": 300}
            with httpx.Client(timeout=PATIENCE_SECONDS) as client:
                while not ended.is_set():
                    answer = client.post(server.url + "/v1/completions", json=body)
            return answer.status_code

        with ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(occupy) for _ in range(2)]
            try:
                answer = wait_for(
                    lambda: next(
                        (
                            one
                            for one in [server.client.post("/v1/completions", json=SHORT)]
                            if one.status_code == 429
                        ),
                        None,
                    )
                )
            finally:
                ended.set()
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
            assert {one.result() for one in busy} <= {200, 429}
        assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1
        refused = server.client.post("/v1/completions", json={**LONG, "n": 3})
        assert refused.status_code == 400  # would never fit


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    """Impatient, so that tests are quick."""
    folder = tmp_path_factory.mktemp("manners")
    options = ["--body-timeout", 1, "--stall-timeout", 1.5, "--no-prefix-cache"]
    with serving(demo_model, folder, *options) as server:
        yield server


@pytest.mark.parametrize("where", ["request", "server"])
def test_deadlines(served, demo_model, tmp_path, where):
    def check(server: Served, body: dict) -> None:
        began = time.monotonic()
        answer = server.client.post("/v1/completions", json={**LONG, "n": 24, **body})
        assert answer.status_code == 504, answer.text[:300]
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert time.monotonic() - began < SOON_SECONDS
        stream = server.client.post(
            "/v1/completions", json={**LONG, "n": 24, "stream": True, **body}
        )
        last = json.loads(stream.text.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in stream.text
        wait_for(lambda: server.running() == 0, SOON_SECONDS)

    if where == "request":
        check(served, {"timeout": 0.3})
    else:
        with serving(demo_model, tmp_path, "--timeout", 0.3) as server:
            check(server, {"timeout": 100})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [0, 0.3])
def test_a_client_that_goes_ends_its_work(served, stream, waits):
    """Also one that goes at once, and one that still waits for a place."""
    connection = raw_connection(served.port)
    head = "X-Request-Id: gone-" + f"{stream}-{waits}".replace(".", "_")
    data = request_bytes("/v1/completions", long_body(stream=stream))
    connection.sendall(data.replace(b"Host: test", head.encode()))
    time.sleep(waits)
    connection.close()
    began = time.monotonic()
    line = served.line_of(head.removeprefix("X-Request-Id: "))
    assert line["status"] == 499 or (stream and line["status"] == 200)
    assert "abort" in line["finish_reasons"]
    assert line["new_tokens"] < 24 * 1000
    wait_for(lambda: served.running() == 0, SOON_SECONDS)
    assert time.monotonic() - began < SOON_SECONDS


def test_a_reader_that_stalls_is_cut(served):
    """Its connection ends in the middle, and what was not read does not stay."""
    body = long_body(stream=True, logprobs=20, n=2)
    with ThreadPoolExecutor(2) as pool:  # so that the engine has its memory
        post = served.client.post
        for answer in pool.map(lambda _: post("/v1/completions", content=body), range(2)):
            assert answer.text.endswith("data: [DONE]\n\n")
    before = served.resources.memory()
    connections = [raw_connection(served.port, receive_buffer=4096) for _ in range(2)]
    for number, connection in enumerate(connections):
        data = request_bytes("/v1/completions", body)
        connection.sendall(data.replace(b"Host: test", b"X-Request-Id: stalled-%d" % number))
    for number, connection in enumerate(connections):
        served.line_of(f"stalled-{number}")
        with contextlib.suppress(ConnectionError):
            assert not read_all(connection).endswith(b"0\r\n\r\n")
        connection.close()
    wait_for(lambda: served.running() == 0)
    assert served.resources.memory() - before < 60 << 20


def test_a_slow_reader_gets_its_text(served, demo_model):
    body = json.dumps({**LONG, "max_tokens": 600, "n": 2, "stream": True}).encode()
    with raw_connection(served.port, receive_buffer=8192) as connection:
        head = request_bytes("/v1/completions", body).replace(b"Host", b"Connection: close\r\nHost")
        connection.sendall(head)
        parts = []
        while part := connection.recv(20000):
            parts.append(part)
            time.sleep(0.001)
    text = b"".join(parts).split(b"\r\n\r\n", 1)[1].decode()
    texts = [""] * 2
    for event in events_of(unchunked(text)):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    engine = clusterfusion.Engine(demo_model)
    alone = engine.generate(PROMPT, max_new_tokens=600, ignore_eos=True, seed=1, temperature=1, n=2)
    assert texts == [one.text for one in alone]


def test_what_nobody_reads_is_joined(demo_model):
    """The feed keeps some events apart, however long nobody takes them; the texts are whole."""
    engine = clusterfusion.Engine(demo_model)
    options = {"max_new_tokens": 700, "ignore_eos": True, "seed": 2, "temperature": 1.0}
    prompt = engine.encode(PROMPT)

    async def read_late() -> tuple[list, list[str]]:
        feed = EngineFeed(engine)
        work = feed.start([prompt], 3, streams=True, keeps_apart=False, **options)
        await work.results()
        events = [event async for burst in work.bursts() for event in burst]
        feed.close()
        texts = ["".join(one.text for one in events if one.index == i) for i in range(3)]
        return events, texts

    events, texts = asyncio.run(read_late())
    assert len(events) <= 260
    assert texts == [one.text for one in engine.generate(prompt, n=3, **options)]
    ends = [event for event in events if event.finish_reason is not None]
    assert sorted(event.index for event in ends) == [0, 1, 2]


def unchunked(text: str) -> str:
    data, out = text.encode(), b""
    while data:
        size, data = data.split(b"\r\n", 1)
        count = int(size, 16)
        out, data = out + data[:count], data[count + 2 :]
    return out.decode()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le",
        request_bytes("/v1/completions", b'{"prompt": "x"}')[:-3],
    ],
)
def test_a_request_that_never_ends_is_cut(served, sent):
    with raw_connection(served.port) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        answer = read_all(connection)
    assert time.monotonic() - began < SOON_SECONDS
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_idle_connections_do_not_stay(served):
    """Some may be cut before the last one is open."""
    before = served.resources.num_sockets()
    assert before > 0
    connections = [raw_connection(served.port) for _ in range(50)]
    for connection in connections:
        answer = read_all(connection)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    wait_for(lambda: served.resources.num_sockets() <= before + 1)
    for connection in connections:
        connection.close()


def wait_until_running(server: Served) -> None:
    """Until a text is computed, which another thread has asked for by the server's own client."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS) as other:
        pattern = r"^vllm:num_requests_running\S+ [1-9]"
        wait_for(lambda: re.search(pattern, other.get("/metrics").text, re.MULTILINE))


def terminated(server: Served, body: dict) -> httpx.Response:
    """What a client gets whose server is asked to end in the middle."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.client.post, "/v1/completions", json=body)
        wait_until_running(server)
        server.process.send_signal(signal.SIGTERM)
        answer = asked.result()
    server.process.wait(PATIENCE_SECONDS)
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url + "/health", timeout=PATIENCE_SECONDS)
    return answer


def test_sigterm_lets_requests_finish(demo_model, tmp_path):
    with serving(demo_model, tmp_path, "--grace", PATIENCE_SECONDS) as server:
        answer = terminated(server, {**LONG, "max_tokens": 400, "n": 4, "stream": True})
        lengths = [0] * 4
        for event in events_of(answer.text):
            lengths[event["choices"][0]["index"]] += 1
        assert lengths == [400] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_sigterm_cuts_at_the_end_of_the_grace(demo_model, tmp_path, stream):
    with serving(demo_model, tmp_path, "--grace", 0.2) as server:
        answer = terminated(server, {**LONG, "n": 64, "stream": stream})
        if stream:
            last = answer.text.split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"


def test_ctrl_c_ends_it_without_a_traceback(demo_model, tmp_path):
    """The first lets requests finish, the second cuts them."""
    options = ["--grace", PATIENCE_SECONDS]
    with serving(demo_model, tmp_path, *options) as server, ThreadPoolExecutor(1) as pool:
        body = {**LONG, "n": 64, "stream": True}
        asked = pool.submit(server.client.post, "/v1/completions", json=body)
        wait_until_running(server)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        server.process.send_signal(signal.SIGINT)
        last = asked.result().text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.process.wait(PATIENCE_SECONDS) == 130
        assert "Traceback" not in server.log.read_text()


def test_ctrl_c_while_it_starts(demo_model, tmp_path):
    """From the moment on at which it has begun to read its options."""
    log = tmp_path / "log"
    code = """if True:
        import clusterfusion.serve.__main__ as program, sys
        make_parser = program._parser
        def parser():
            print("up", flush=True)
            return make_parser()
        program._parser = parser
        sys.exit(program.main())
    """
    for wait in [0, 0.2, 0.5]:
        with log.open("w") as errors:
            command = [sys.executable, "-c", code, demo_model, "--port", "0"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
            assert process.stdout.readline() == b"up\n"
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_SECONDS) == 130, log.read_text()
        assert "Traceback" not in log.read_text()


def test_api_keys(demo_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# a comment\nsecret-one\n\n  secret-two  \n")
    with serving(demo_model, tmp_path, "--api-key-file", keys) as server:
        body = {"prompt": "x", "max_tokens": 1}

        def status(key: str | None, path: str = "/v1/completions") -> int:
            headers = {} if key is None else {"Authorization": key}
            answer = server.client.post(path, json=body, headers=headers)
            if answer.status_code == 401:
                assert answer.json()["error"]["code"] == "invalid_api_key"
            return answer.status_code

        assert status("Bearer secret-one") == status("bearer secret-two") == 200
        wrong = [None, "", "Bearer", "Bearer secret", "Basic secret-one", "secret-one"]
        wrong += ["Bearer secret-one x", "Bearer # a comment", "Bearer \u00e9"]
        for key in wrong:
            assert status(key if key is None else key.encode("latin-1")) == 401, key
        for path in ["/tokenize", "/detokenize", "/v1/chat/completions", "/nowhere"]:
            assert status(None, path) == 401
        assert server.client.get("/v1/models").status_code == 401
        for path in ["/health", "/health/live", "/metrics", "/version", "/"]:
            assert server.client.get(path).status_code == 200
        assert "secret" not in server.log.read_text()
    keys.write_text("\n# none\n")
    assert "has no key" in failed_start(demo_model, "--api-key-file", keys)


def test_cors_is_off_unless_told(served, demo_model, tmp_path):
    origin = {"Origin": "https://example.org"}
    ask = {**origin, "Access-Control-Request-Method": "POST"}
    for method, path, headers in [("GET", "/health", origin), ("OPTIONS", "/v1/completions", ask)]:
        answer = served.client.request(method, path, headers=headers)
        assert "access-control-allow-origin" not in answer.headers
    with serving(demo_model, tmp_path, "--cors-origin", "https://example.org") as server:
        answer = server.client.get("/health", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        answer = server.client.options("/v1/completions", headers=ask)
        assert answer.status_code == 200
        answer = server.client.get("/health", headers={"Origin": "https://other.org"})
        assert "access-control-allow-origin" not in answer.headers


def test_log_lines(demo_model, tmp_path):
    with serving(demo_model, tmp_path) as server:
        headers = {"X-Request-Id": "my-id_1.2"}
        body = {**LONG, "max_tokens": 20, "n": 2}
        answer = server.client.post("/v1/completions", json=body, headers=headers)
        assert answer.headers["x-request-id"] == "my-id_1.2"
        assert answer.json()["id"] == "cmpl-my-id_1.2"
        line = server.line_of("my-id_1.2")
        assert line["status"] == 200 and line["path"] == "/v1/completions"
        assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
        assert line["new_tokens"] == 40 and line["sequences"] == 2
        assert line["finish_reasons"] == ["length"]
        assert 0 < line["first_token_seconds"] < line["seconds"]
        assert 0 < line["seconds_per_token"] < line["seconds"]
        short = server.complete(prompt=PROMPT, max_tokens=1)
        line = server.line_of(short["id"].removeprefix("cmpl-"))
        assert 0 < line["first_token_seconds"] <= line["seconds"] + 1e-4  # rounded to that
        strange = server.client.get("/health", headers={"X-Request-Id": 'a"b\tc'})
        assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])
        assert PROMPT not in server.log.read_text()
    with serving(demo_model, tmp_path, "--log-prompts") as server:
        answer = server.complete(prompt=PROMPT, max_tokens=1)
        line = server.line_of(answer["id"].removeprefix("cmpl-"))
        assert line["prompts"] == [PROMPT]


def test_a_path_makes_no_line_of_its_own(caplog):
    record = Record(id="1", method="GET", path='/v1/x\nforged \x1b[31m\0"é', client="::1")
    with caplog.at_level(logging.INFO):
        record.log(as_json=False)
    [line] = [entry.getMessage() for entry in caplog.records]
    assert line.startswith("::1 GET /v1/x%0Aforged%20%1B%5B31m%00%22%C3%A9 ")


def test_an_engine_that_fails_is_told(tmp_path):
    """A token whose embedding is not a number: its requests alone fail, with the reason."""
    from checkpoints import write_random_checkpoint
    from safetensors.numpy import load_file, save_file

    folder = write_random_checkpoint(tmp_path / "model", tokenizer="train", seed=4)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][7] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with serving(folder, tmp_path) as server:
        answer = server.client.post("/v1/completions", json={"prompt": [5, 7], "max_tokens": 3})
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["type"] == "server_error" and "gpt_neox.embed_in.weight" in error["message"]
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/health/live").status_code == 200
        server.complete(prompt=[5, 6], max_tokens=3, logit_bias={"7": -100})
        assert server.client.get("/health").status_code == 200


FILE_OPTIONS = ["--api-key-file", "--chat-template"]
# Runs the program once for each list of arguments, in one process, so that it is imported once.
STARTS = """
import contextlib, io, json, sys
from clusterfusion.serve.__main__ import main
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, said.getvalue()]))
"""


def failed_starts(*starts: tuple[object, ...], status: int = 1) -> list[str]:
    """What the program says of each of these command lines, which it must refuse."""
    lines = json.dumps([list(map(str, arguments)) for arguments in starts])
    ended = subprocess.run(
        [sys.executable, "-c", STARTS],
        input=lines,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [code for code, _ in found] == [status] * len(starts), found
    assert "Traceback" not in ended.stdout
    return [said for _, said in found]


def failed_start(*arguments: object, status: int = 1) -> str:
    """The same of one command line, by a process of its own."""
    command = [sys.executable, "-m", "clusterfusion.serve", *arguments]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_starts_that_fail_say_why(demo_model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in failed_start(demo_model, "--port", port)
    assert "--host: expected an address" in failed_start(demo_model, "--host", "", status=2)
    template = tmp_path / "broken.jinja"
    template.write_text("{% for %}")
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    free = ["--port", 0]
    nowhere, broken, missing, *unreadable = failed_starts(
        (tmp_path / "nowhere", *free),
        (demo_model, "--chat-template", template, *free),
        (demo_model, "--chat-template", tmp_path / "x", *free),
        *((demo_model, option, latin, *free) for option in FILE_OPTIONS),
        *((demo_model, option, tmp_path, *free) for option in FILE_OPTIONS),
    )
    assert "no such folder" in nowhere
    assert "not valid Jinja" in broken
    assert "No such file" in missing
    for said in unreadable[: len(FILE_OPTIONS)]:
        assert str(latin) in said and "UTF-8" in said
    for said in unreadable[len(FILE_OPTIONS) :]:
        assert f"Is a directory: '{tmp_path}'" in said
    broken_model = tmp_path / "model"
    shutil.copytree(demo_model, broken_model)
    (broken_model / "config.json").write_text("{")
    [said] = failed_starts((broken_model, *free))
    assert "config.json" in said


# Wrong in the program's eyes and in the engine's, and what says so.
WRONG_ENGINE_OPTIONS = {
    ("--threads", "-1"): "--threads",
    ("--context", "-1"): "--context",
    ("--context", "999999"): "error: --context must be in [1, 1024]",
    ("--draft-tokens", "16"): "error: --draft-tokens must be in [1, 15]",
    ("--draft", ""): "error: --draft: expected ",
    ("--draft", "ngram", "--draft-tokens", "0"): "--draft-tokens",
    ("--revision", "main"): "error: ",
    ("--kv-bytes", "1"): "error: --kv-bytes is 1, ",
    ("--max-sequences", "0"): "--max-sequences",
}


def test_wrong_options_end_with_2(demo_model, tmp_path):
    """As the help says, whoever notices: the parser or the engine."""
    said = failed_starts(
        *((demo_model, *options, "--port", 0) for options in WRONG_ENGINE_OPTIONS), status=2
    )
    for options, one, expected in zip(
        WRONG_ENGINE_OPTIONS, said, WRONG_ENGINE_OPTIONS.values(), strict=True
    ):
        assert expected in one, (options, one)


def test_wrong_options_of_the_program(demo_model, tmp_path):
    grace, port, sequences = failed_starts(
        (demo_model, "--grace", "inf"),
        (demo_model, "--port", 70000),
        (demo_model, "--max-sequences", "x"),
        status=2,
    )
    assert "--grace: expected 0 to " in grace
    assert "expected 0 to 65535" in port
    assert "invalid" in sequences


def test_without_the_extra_it_says_what_to_install(demo_model, tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ImportError('pydantic is not here')\n")
    command = [sys.executable, "-m", "clusterfusion.serve", str(demo_model)]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == 1
    assert "pydantic is not here" in ended.stderr
    assert "pip install 'clusterfusion-lm[serve]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_program_becomes_the_server(demo_model, tmp_path):
    """`clusterfusion serve`: the same process, so that signals reach it."""
    if "CLUSTERFUSION_BIN" not in os.environ:
        pytest.skip("CLUSTERFUSION_BIN is not set")
    program = Path(os.environ["CLUSTERFUSION_BIN"])
    environment = os.environ | {"CLUSTERFUSION_HUB_PYTHON": sys.executable}
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [program, "serve", demo_model, "--port", "0"], stderr=errors, env=environment
        )
    try:
        found = wait_for(lambda: re.search(r"on (http://\S+)", log.read_text()))
        wait_for(lambda: "startup complete" in log.read_text())
        assert httpx.get(found.group(1) + "/health", timeout=PATIENCE_SECONDS).status_code == 200
    finally:
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGTERM

    def says(*arguments: str, python: str = sys.executable, status: int) -> str:
        ended = subprocess.run(
            [program, "serve", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env=os.environ | {"CLUSTERFUSION_HUB_PYTHON": python},
        )
        assert ended.returncode == status, ended.stderr
        return ended.stdout + ended.stderr

    assert "--max-waiting" in says("--help", status=0)
    assert "required: MODEL" in says(status=2)
    assert "cannot run /no/python" in says("x", python="/no/python", status=1)
