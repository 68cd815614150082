"""Whatever a client sends: a 4xx that names the field, and an engine that goes on."""

import json
import socket
import time

import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from serving import PATIENCE_SECONDS, raw_connection, request_bytes, serving, wait_for

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
HUGE = 10**400
INTEGERS = ["1", 1.5, True, [], {}, [1], HUGE, -HUGE]
NUMBERS = ["1", True, [], {}, "NaN", HUGE]
BOOLEANS = ["true", 1, 0, [], {}]
TEXTS = [1, True, [], {}, ["x"]]

# By field of a completion: values that are wrong.
WRONG: dict[str, list] = {
    "model": [*TEXTS, "", "other", "x" * 10000],
    "prompt": [
        None,
        "",
        1,
        True,
        {},
        [],
        [[]],
        ["x", []],
        [[1], []],
        [1, "x"],
        ["x", 1],
        [1.5],
        [-1],
        [True],
        [HUGE],
        [4096],
        [2**31],
        [[1], [4096]],
        [[[1]]],
        [None],
        ["x", None],
        [1] * 1024,
        ["x", [1] * 1024],
        "x " * 3000,
    ],
    "max_tokens": [*INTEGERS, -1, 2**31],
    "temperature": [*NUMBERS, -0.1, 100.5, -1e308],
    "top_p": [*NUMBERS, 0, -1, 1.001, 1e-320],
    "n": [*INTEGERS, 0, -1, 129],
    "best_of": [*INTEGERS, 0, 2],
    "stream": BOOLEANS,
    "stream_options": [1, "x", [], {"include_usage": 1}, {"include_usage": True}],
    "stop": [1, True, {}, "", [""], ["x", ""], [1], [["x"]], ["x"] * 65, [None]],
    "seed": ["1", 1.5, True, [], {}, HUGE, 2**64, -(2**63) - 1],
    "echo": BOOLEANS,
    "logprobs": [*INTEGERS, -1, 101],
    "suffix": [1, "x", []],
    "logit_bias": [
        1,
        "x",
        [],
        [1],
        {"x": 1},
        {"-1": 1},
        {"4096": 1},
        {"1": 101},
        {"1": "1"},
        {"1": True},
        {"1": None},
        {"1": HUGE},
        {"1.0": 1},
        {"": 1},
        {"99999999999999": 1},
        {"\u0661": 1},
    ],
    "presence_penalty": [*NUMBERS, 2.01, -2.01],
    "frequency_penalty": [*NUMBERS, 2.01, -2.01],
    "user": TEXTS,
    "top_k": [*INTEGERS, -2, 2**31],
    "min_p": [*NUMBERS, -0.1, 1.1],
    "repetition_penalty": [*NUMBERS, 0, -1, 1e7],
    "min_tokens": [*INTEGERS, -1, 17, 2**31],
    "ignore_eos": BOOLEANS,
    "stop_token_ids": [1, "x", {}, ["x"], [1.5], [-1], [4096], [True], [HUGE], [[1]]],
    "prompt_logprobs": [*INTEGERS, -1, 101],
    "return_token_ids": BOOLEANS,
    "add_special_tokens": BOOLEANS,
    "skip_special_tokens": BOOLEANS,
    "timeout": [*NUMBERS, 0, -1, 1e7],
}
CHAT_WRONG: dict[str, list] = {
    "messages": [
        None,
        "x",
        {},
        [],
        [1],
        [{}],
        [{"role": 1, "content": "x"}],
        [{"content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "x " * 3000}],
    ],
    "max_completion_tokens": [*INTEGERS, -1],
    "logprobs": [*BOOLEANS],
    "top_logprobs": [*INTEGERS, -1, 101, 1],
    "tools": [[], [{"type": "function"}], "x"],
    "functions": [[], "x"],
    "response_format": [1, "x", {"type": "json_object"}, {}],
    "chat_template_kwargs": [1, "x", [], {"messages": []}],
}
BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"1",
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x"',
    b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}",
    b'{"logit_bias": ' + b'{"1":' * 100000 + b"1" + b"}" * 100000 + b"}",
    b"\0",
    b'{"prompt": "x\0"}',
]
BROKEN_NUMBERS = [
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "max_tokens": 1e1}',
]


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with serving(demo_model, folder, "--chat-template", folder / "chat.jinja") as server:
        before = server.complete(prompt="It was", max_tokens=10, temperature=0)["choices"]
        yield server
        after = server.complete(prompt="It was", max_tokens=10, temperature=0)["choices"]
        assert before == after
        wait_for(lambda: server.running() == 0)


def refused(answer, field: str | None) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert len(error["message"]) < 2000
    if field is not None:
        assert error["param"] == field, error


def cases(wrong: dict[str, list]) -> list:
    return [
        pytest.param(field, value, id=f"{field}-{number}")
        for field, values in wrong.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("field", "value"), cases(WRONG))
def test_wrong_fields_of_completions(served, field, value):
    body = {"prompt": "x", field: value}
    for stream in [{}, {"stream": True}] if field not in ("stream", "stream_options") else [{}]:
        refused(served.client.post("/v1/completions", json=body | stream), field)


@pytest.mark.parametrize(("field", "value"), cases(CHAT_WRONG))
def test_wrong_fields_of_chats(served, field, value):
    body = {"messages": [{"role": "user", "content": "x"}], field: value}
    refused(served.client.post("/v1/chat/completions", json=body), field)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_broken_bodies(served, path, body):
    refused(served.client.post(path, content=body), None)


@pytest.mark.parametrize("body", BROKEN_NUMBERS)
def test_numbers_that_are_none(served, body):
    field = "max_tokens" if b"max_tokens" in body else "temperature"
    refused(served.client.post("/v1/completions", content=body), field)


def test_missing_fields(served):
    refused(served.client.post("/v1/completions", json={}), "prompt")
    refused(served.client.post("/v1/chat/completions", json={}), "messages")
    refused(served.client.post("/tokenize", json={}), "prompt")
    refused(served.client.post("/detokenize", json={}), "tokens")


@pytest.mark.parametrize("tokens", [[-1], [4096], [1.5], ["x"], "x", {}, [HUGE], [[1]], None])
def test_wrong_tokens_to_decode(served, tokens):
    refused(served.client.post("/detokenize", json={"tokens": tokens}), "tokens")


def test_too_much_in_one_request(served):
    """More texts than ever fit, and more log-probabilities than an answer may hold."""
    body = {"prompt": ["x"] * 100, "n": 128, "max_tokens": 1}
    refused(served.client.post("/v1/completions", json=body), "n")
    body = {"prompt": ["x"] * 10, "n": 10, "max_tokens": 1000, "logprobs": 100}
    refused(served.client.post("/v1/completions", json=body), "logprobs")


def test_paths_and_methods_that_are_not_there(served):
    for method, path in [("GET", "/v1/completions"), ("POST", "/v1/models"), ("GET", "/nowhere")]:
        refused(served.client.request(method, path), None)
    refused(served.client.get("/page/../app.py"), None)
    refused(served.client.get("/page/%2e%2e/app.py"), None)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\0" * 1000,
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 200000,
        b"GET / HTTP/1.1\r\nX: " + b"a" * 200000,
    ],
)
def test_garbage_instead_of_http(served, data):
    with raw_connection(served.port) as connection:
        try:
            connection.sendall(data)
            answer = connection.recv(1 << 16)
        except ConnectionError:
            answer = b""
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert served.client.get("/health").status_code == 200


def test_param_is_a_field_of_the_request_or_null(demo_model, tmp_path):
    """As the openai client reads it, also where the engine is who refuses."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ["--kv-bytes", 2 << 20, "--chat-template", template]  # 128 positions
    with serving(demo_model, tmp_path, *options) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        completion = {"model": str(demo_model), "prompt": "x", "max_tokens": 5}
        chat = {"model": str(demo_model), "messages": [{"role": "user", "content": "x"}]}
        for create, body, wrong, param in [
            (client.completions.create, completion, {"max_tokens": 900}, None),
            (client.chat.completions.create, chat, {"max_tokens": 900}, None),
            (client.completions.create, completion, {"prompt": "x" * 300}, None),
            (client.completions.create, completion, {"prompt": [1] * 1100}, "prompt"),
            (
                client.completions.create,
                completion,
                {"extra_body": {"min_tokens": 6}},
                "min_tokens",
            ),
            (client.completions.create, completion, {"temperature": -1}, "temperature"),
        ]:
            with pytest.raises(openai.BadRequestError) as refusal:
                create(**body | wrong)
            assert refusal.value.param == param, refusal.value


def test_words_of_the_engine_become_fields():
    """Whatever a message begins with, `param` is one of the schema's fields, or nothing."""
    from clusterfusion.serve.errors import _FIELDS, of_engine
    from clusterfusion.serve.schema import CompletionRequest

    assert set(_FIELDS.values()) <= set(CompletionRequest.model_fields)
    for message, in_completion, in_chat in [
        ("max_new_tokens must be >= 0, got -1", "max_tokens", "max_tokens"),
        ("requests[0]: top_p must be in (0, 1]", "top_p", "top_p"),
        ("the prompt has 9 tokens", "prompt", "messages"),
        ("prompt_tokens[1] is 9", "prompt", "messages"),
        ("logit_bias of token 5 must be", "logit_bias", "logit_bias"),
        ("the request may need 9 pages", None, None),
        ("out of memory", None, None),
        ("", None, None),
    ]:
        for is_chat, param in ((False, in_completion), (True, in_chat)):
            told = of_engine(ValueError(message), is_chat)
            assert (told.status, told.body["error"]["param"]) == (400, param), message


def test_a_path_without_v1_is_told_where_to_go(served):
    """A client's base_url without /v1 is the commonest mistake of all."""
    for path, right in [("/completions", "/v1/completions"), ("/v1/tokenize", "/tokenize")]:
        answer = served.client.post(path, json={"prompt": "x"})
        refused(answer, None)
        assert f"did you mean {right}?" in answer.json()["error"]["message"]
    answer = served.client.post("/v1/embeddings", json={})
    assert "did you mean" not in answer.json()["error"]["message"]


def test_a_body_in_an_encoding_is_refused_by_name(served):
    headers = {"Content-Encoding": "gzip"}
    answer = served.client.post("/v1/completions", content=b"\x1f\x8b\x08", headers=headers)
    assert answer.status_code == 415 and "'gzip'" in answer.json()["error"]["message"]
    served.client.post("/v1/completions", json={"prompt": "x"}, headers={"Content-Encoding": ""})


def test_a_byte_order_mark_is_no_error(served):
    body = b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}'
    assert served.client.post("/v1/completions", content=body).status_code == 200


def whole_answer(connection: socket.socket) -> bytes:
    """An answer that announces its length."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1 << 16)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def test_an_offer_of_http_2_is_declined(served):
    """As Java's HttpClient makes it with each request: the body follows as if it were not there."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b'{"prompt": "xyz", "max_tokens": 1, "echo": true}'
    data = request_bytes("/v1/completions", body).replace(b"Host", offer + b"Host")
    with raw_connection(served.port) as connection:
        for _ in range(2):  # on one connection
            connection.sendall(data)
            answer = whole_answer(connection)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert b'"text":"xyz' in answer


def test_the_limit_of_a_head_is_exact(served):
    """However it arrives, also behind another request."""

    def status(size: int, connection) -> bytes:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nX: "
        data = head + b"y" * (size - len(head))
        connection.sendall(data + b"\r\n\r\n")
        return whole_answer(connection)[9:12]

    with raw_connection(served.port) as connection:
        assert status(65000, connection) == b"200"
        assert status(65000, connection) == b"200"
        assert status(66000, connection) == b"431"
    with raw_connection(served.port) as connection:
        assert status(66000, connection) == b"431"


def test_a_request_may_come_in_any_pieces(served):
    """A body behind a head whose end is torn is no part of the head, however long."""
    body = json.dumps({"prompt": "x", "max_tokens": 1, "user": "y" * 100_000}).encode()
    data = request_bytes("/v1/completions", body)
    end = data.index(b"\r\n\r\n")
    with raw_connection(served.port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(end, end + 5):
            connection.sendall(data[:cut])
            time.sleep(0.05)
            connection.sendall(data[cut:])
            assert whole_answer(connection).startswith(b"HTTP/1.1 200"), cut - end


def test_strict_refuses_unknown_fields(served, demo_model, tmp_path):
    body = {"prompt": "x", "max_tokens": 1, "no_such_field": 1}
    served.complete(**body)
    assert "ignored fields that are not known: ['no_such_field']" in served.log.read_text()
    with serving(demo_model, tmp_path, "--strict") as strict:
        refused(strict.client.post("/v1/completions", json=body), "no_such_field")
        body = {"prompt": "x", "max_tokens": 1, "stream": True, "stream_options": {"y": 1}}
        assert strict.client.post("/v1/completions", json=body).status_code == 400


def test_body_size_limit(demo_model, tmp_path):
    with serving(demo_model, tmp_path, "--max-body-bytes", 1000) as server:
        fits = {"prompt": "x" * 900, "max_tokens": 1}
        assert server.client.post("/v1/completions", json=fits).status_code == 200
        body = json.dumps({"prompt": "x" * 1000}).encode()
        answer = server.client.post("/v1/completions", content=body)
        assert answer.status_code == 413
        refused(answer, None)
        # In pieces of unknown number, and by a header that promises more than ever comes.
        answer = server.client.post("/v1/completions", content=iter([body] * 1000))
        assert answer.status_code == 413
        with raw_connection(server.port) as connection:
            connection.sendall(request_bytes("/v1/completions", body)[:200])
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


def _give_time(body):
    """Lengthens a valid timeout: whether a text ends within a short one depends on the machine."""
    seconds = body.get("timeout") if isinstance(body, dict) else None
    if type(seconds) in (int, float) and 0 < seconds < PATIENCE_SECONDS:
        body["timeout"] = PATIENCE_SECONDS


def test_schemathesis(demo_model, tmp_path):
    """What follows from the served document, right and wrong: answers keep to it."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode, openapi
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # No schema says all: ids have to be in the vocabulary, prompts need tokens.
    but = [positive_data_acceptance]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    short = ["--context", 24, "--chat-template", tmp_path / "chat.jinja"]
    with serving(demo_model, tmp_path, *short) as server:
        schema = openapi.from_url(server.url + "/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 10
        for operation in operations:
            for mode in GenerationMode:

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=20,
                    deadline=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                )
                def check(case):
                    _give_time(case.body)
                    case.call_and_validate(excluded_checks=but, timeout=PATIENCE_SECONDS)

                try:
                    check()
                except Unsatisfiable:
                    assert mode == GenerationMode.NEGATIVE and operation.method == "get"
