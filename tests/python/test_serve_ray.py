"""The server on several replicas by Ray Serve: one of them is killed while it works."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import clusterfusion
import httpx
import pytest

pytest.importorskip(
    "ray.serve",
    reason="NOT TESTED: serving on many machines, since Ray is not installed: `make ray-test`",
)

import yaml
from clusterfusion.serve import ray
from clusterfusion.serve.ray import Options, build_app
from clusterfusion.serve.ray_routing import AffinityRouter, affinity_of
from conftest import ROOT
from pydantic import ValidationError
from serve_load import stream
from serving import events_of, wait_for

LONG_PROMPT = "The old house stood upon a hill, and nobody had lived in it for years. " * 8
MARK = "CLUSTERFUSION_TEST_CLUSTER"
# `serve` on a cluster of its own, without the dashboard's many processes.
SERVE_RUN = """
import ray
from ray.serve.scripts import cli
ray.init("local", num_cpus=2, include_dashboard=False, namespace="serve", logging_level="warning")
cli()
"""
# Of Ray's own processes, which start slowly on a busy machine.
PATIENCE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
}


def config_of_docs() -> dict:
    """The example of docs/serving.md."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    return yaml.safe_load(block)


class Cluster:
    """A running cluster of this machine alone."""

    def __init__(self, port: int, mark: str) -> None:
        self.port = port
        self._mark = mark
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)

    def complete(self, headers: dict[str, str] | None = None, **body) -> tuple[str, dict]:
        """The replica that answered, and the answer, which must be one of success."""
        answer = self.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-replica"], answer.json()

    def replicas(self) -> list[int]:
        """Process ids of the engines' replicas."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_replica = b"ServeReplica:lm:Engine" in (folder / "cmdline").read_bytes()
                if is_replica and self._mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def running(self, headers: dict[str, str]) -> float:
        """Texts that the replica of a session computes or has waiting."""
        text = self.client.get("/metrics", headers=headers).text
        lines = re.findall(r"^vllm:num_requests_(?:running|waiting)\S* (\S+)$", text, re.MULTILINE)
        assert lines
        return sum(map(float, lines))


@pytest.fixture(scope="module")
def cluster(demo_model, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = config_of_docs()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["model"] = str(demo_model)
    folder = tmp_path_factory.mktemp("ray")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    mark = f"{MARK}={port}-{time.monotonic_ns()}"
    environment = os.environ | PATIENCE | dict([mark.split("=")])
    command = [sys.executable, "-c", SERVE_RUN, "run", "cluster.yaml"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    found = Cluster(port, mark)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return found.client.get("/health").status_code == 200 and len(found.replicas()) == 2
        return False

    try:
        wait_for(answers, 180)
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        print(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def engine(demo_model) -> clusterfusion.Engine:
    return clusterfusion.Engine(demo_model)


def test_texts_are_those_of_the_engine_alone(cluster, engine):
    body = {"prompt": "It was a dark", "max_tokens": 40, "seed": 3, "n": 2, "logprobs": 2}
    alone = engine.generate("It was a dark", max_new_tokens=40, seed=3, temperature=1.0, n=2)
    _, answer = cluster.complete(**body)
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in alone]
    streamed = cluster.client.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    texts = ["", ""]
    for event in events_of(streamed.text):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [one.text for one in alone]


def test_it_is_the_same_application(cluster):
    client = cluster.client
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 1024
    assert client.post("/tokenize", json={"prompt": "It was"}).json()["count"] == 2
    assert "<html" in client.get("/").text
    assert client.get("/nowhere").status_code == 404
    answer = client.post("/v1/completions", json={"max_tokens": -1}, headers={"X-Request-Id": "a"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    assert answer.headers["x-request-id"] == "a"
    assert client.post("/v1/completions", content=b"x" * (9 << 20)).status_code == 413


@pytest.mark.parametrize("kind", ["prefix", "session", "user", "tokens"])
def test_what_belongs_together_meets_its_prefix_cache(cluster, engine, kind):
    """All of one kind to one replica, which has read the prompt before; kinds to both replicas."""

    def ask(group: int, number: int) -> tuple[str, int]:
        prompt = f"{kind} {group}. {LONG_PROMPT}"
        body: dict = {"prompt": f"{prompt} {number}", "max_tokens": 1}
        headers = {}
        if kind == "tokens":
            body["prompt"] = engine.encode(body["prompt"])
        if kind == "session":
            headers["X-Session-Id"] = f"session {group}"
        if kind == "user":
            body["user"] = f"user {group}"
        replica, answer = cluster.complete(headers, **body)
        return replica, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    chosen = set()
    for group in range(8):
        replicas, cached = zip(*(ask(group, number) for number in range(3)), strict=True)
        assert len(set(replicas)) == 1
        assert min(cached[1:]) >= 64
        chosen.add(replicas[0])
    assert len(chosen) == 2


def test_a_busy_replica_is_passed_over(cluster):
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "user": "one"}
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda _: cluster.complete(**body), range(48)))
    assert len({replica for replica, _ in answers}) == 2


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_ends_its_work(cluster, streams):
    """Before anything has come, or in the middle of a stream."""
    session = {"X-Session-Id": f"leaves {streams}"}
    body = {"prompt": "x", "max_tokens": 1000, "n": 60, "ignore_eos": True, "stream": streams}
    url = str(cluster.client.base_url) + "/v1/completions"
    if streams:
        with httpx.stream("POST", url, json=body, headers=session, timeout=60) as answer:
            next(answer.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=session, timeout=1)
    wait_for(lambda: cluster.running(session) == 0, 10)


async def outcome_of(port: int, body: dict) -> tuple[str, str]:
    """The text of a request that may be streamed, and how it ended."""
    async with httpx.AsyncClient(timeout=300) as client:
        answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return answer.json()["choices"][0]["text"], "whole"
    *events, last = [line for line in answer.text.split("\n\n") if line]
    read = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    text = "".join(choice["text"] for choice in read)
    if last == "data: [DONE]":
        return text, "whole"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert events, "a stream that had not begun was lost"
    return text, "cut"


def test_a_replica_that_is_killed_loses_no_request_that_had_not_begun(cluster, engine):
    """Whole answers all come; streams come, or end with an event that says so."""
    options = {"max_tokens": 120, "ignore_eos": True}
    bodies = [
        {"prompt": f"Chapter {number}", "seed": number, "stream": number % 2 == 0, **options}
        for number in range(32)
    ]
    alone = engine.generate(
        [body["prompt"] for body in bodies],
        max_new_tokens=120,
        ignore_eos=True,
        temperature=1.0,
        seed=[body["seed"] for body in bodies],
    )
    before = set(cluster.replicas())

    async def work() -> list[tuple[str, str]]:
        asked = [asyncio.ensure_future(outcome_of(cluster.port, body)) for body in bodies]
        await stream(cluster.port, {"prompt": "x", "max_tokens": 100, "stream": True})
        os.kill(min(before), signal.SIGKILL)
        # Also what comes while Ray has not yet noticed.
        asked += [asyncio.ensure_future(outcome_of(cluster.port, body)) for body in bodies]
        return await asyncio.gather(*asked)

    outcomes = asyncio.run(work())
    ends = Counter(end for _, end in outcomes)
    for (text, end), body, one in zip(outcomes, bodies * 2, [*alone, *alone], strict=True):
        if end == "whole":
            assert text == one.text
        else:
            assert body["stream"] and one.text.startswith(text)
    assert ends["cut"] > 0, "nothing was cut: the replica had no work when it was killed"
    wait_for(lambda: len(set(cluster.replicas()) - {min(before)}) == 2, 120)
    cluster.complete(prompt="x", max_tokens=1)


@pytest.mark.parametrize("path", ["/v1/completions", "/"])
def test_a_route_prefix_is_taken_off(path):
    """As applications beside others have it; the replica sees what a server alone would see."""
    from starlette.requests import Request

    async def receive() -> dict:
        return {"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"query_string": b"", "headers": [], "client": ("127.0.0.1", 1), "server": None}
    scope |= {"root_path": "/lm", "path": "/lm" + path.rstrip("/")}
    ingress = ray._Ingress(SimpleNamespace(options=lambda **_: None), 100, 8, 1)
    relay = asyncio.run(ingress(Request(scope, receive)))
    assert relay._request.scope["path"] == path
    assert relay._request.affinity == affinity_of({}, b'{"prompt": "x"}', 8)


def test_affinity():
    def of(body: object, **headers: str) -> str | None:
        return affinity_of(headers, json.dumps(body).encode(), 8)

    same = [{"prompt": "abcdefgh, one"}, {"prompt": "abcdefgh, two"}, {"prompt": ["abcdefgh"]}]
    assert len({of(body) for body in same}) == 1
    assert of({"prompt": "abcdefg"}) != of({"prompt": "abcdefgh"})
    assert of({"prompt": [1, 2]}) == of({"prompt": [1, 2, 3]}) == of({"prompt": [[1, 2], [3]]})
    assert of({"prompt": [1, 3]}) != of({"prompt": [1, 2]}) != of({"prompt": [1]})
    assert of({"prompt": "a", "user": "u"}) == of({"prompt": "b", "user": "u"})
    first = [{"role": "user", "content": "hello"}]
    assert of({"messages": first}) == of({"messages": [*first, {"role": "assistant"}]})
    session = {"x-session-id": "s"}
    assert affinity_of(session, b"no JSON", 8) == affinity_of(session, b"{}", 8) is not None
    for body in [[], 1, "x", {}, {"prompt": ""}, {"prompt": []}, {"user": 3}, {"prompt": {}}]:
        assert of(body) is None, body
    for junk in [b"", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']:
        assert affinity_of({}, junk, 0) is None
    assert affinity_of({}, b'{"prompt": "\\ud800"}', 8)


def routed(affinity: str | None, loads: dict[str, int], max_imbalance: int = 4) -> list[list[str]]:
    """What a router would try, by names, with so many requests at each replica."""
    router = AffinityRouter.__new__(AffinityRouter)
    router.initialize_state(max_imbalance)
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in loads]
    router._replica_queue_len_cache = SimpleNamespace(
        get=lambda identity: loads[identity.unique_id] or None
    )
    request = SimpleNamespace(
        args=[SimpleNamespace(affinity=affinity)], routing_context=SimpleNamespace()
    )
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    assert request.routing_context.should_backoff
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks if rank]


def test_routing_is_even_and_moves_little():
    names = [f"replica {i}" for i in range(5)]
    keys = [f"key {i}" for i in range(2000)]
    first = {key: routed(key, dict.fromkeys(names, 0))[0][0] for key in keys}
    counts = Counter(first.values())
    assert all(320 < counts[name] < 480 for name in names), counts
    fewer = {key: routed(key, dict.fromkeys(names[1:], 0))[0][0] for key in keys}
    assert all(fewer[key] == first[key] for key in keys if first[key] != names[0])


def test_routing_minds_the_load():
    ((first,), (second,), (third,)) = routed("key", {"a": 0, "b": 0, "c": 0})
    assert routed("key", {first: 3, second: 0, third: 0}) == [[first], [second], [third]]
    assert routed("key", {first: 4, second: 0, third: 0}) == [[second], [third], [first]]
    assert routed("key", {first: 9, second: 9, third: 5}) == [[third], [first, second]]
    (two,) = routed(None, {"a": 0, "b": 0, "c": 0})
    assert len(set(two)) == 2
    assert routed(None, {"a": 9}) == [["a"]]


def test_options_of_a_command_line(tmp_path):
    """Ray hands them over as strings."""
    keys = tmp_path / "keys"
    keys.write_text("one\n# none\ntwo\n")
    given = {
        "model": "owner/name",
        "num_replicas": "auto",
        "engine": '{"mode": "latency", "max_sequences": 8}',
        "settings": '{"timeout": 5}',
        "ray_actor_options": '{"num_gpus": 1}',
        "autoscaling_config": '{"max_replicas": 3}',
        "api_key_file": str(keys),
        "retry_seconds": "2.5",
    }
    options = Options.model_validate(given)
    assert options.engine["max_sequences"] == options.max_sequences == 8
    settings = options.make_settings()
    assert settings.timeout == 5 and settings.api_keys == ["one", "two"]
    assert settings.model_names == ["owner/name"]
    application = build_app(options)
    (engines,) = application._bound_deployment.init_args[:1]
    deployment = engines._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert deployment.max_ongoing_requests == 8
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "model"),
        ({"model": "x", "engine": "{"}, "expected an object in JSON"),
        ({"model": "x", "engine": {"modes": 1}}, "unexpected keyword argument 'modes'"),
        ({"model": "x", "settings": {"timeouts": 1}}, "unexpected keyword argument 'timeouts'"),
        ({"model": "x", "api_key_file": "/no/file"}, "No such file"),
        ({"model": "x", "num_replicas": "many"}, "num_replicas"),
        ({"model": "x", "replicas": 2}, "replicas"),
        ({"model": "x", "max_imbalance": 0}, "max_imbalance"),
    ],
)
def test_bad_options_are_named(given, says):
    with pytest.raises(ValidationError, match=re.escape(says)):
        Options.model_validate(given)
