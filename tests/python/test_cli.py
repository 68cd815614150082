"""The command line: the built program as a subprocess, seen from outside.

The program is the one that CLUSTERFUSION_BIN names, else the one on PATH or beside this Python.
"""

import fcntl
import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from reference_model import ReferenceModel, log_softmax
from tokenizers import Tokenizer

TIMEOUT = 300
PROMPT = "It was the best of times"
MODEL_COMMANDS = ["generate", "score", "perplexity", "tokenize", "info", "bench"]
COMMANDS = [*MODEL_COMMANDS, "completion"]
# Long enough that no test sees the end of a generation which it interrupts.
LONG_CONTEXT = 60000


def find_program() -> str | None:
    installed = Path(sysconfig.get_path("scripts")) / "clusterfusion"
    return (
        os.environ.get("CLUSTERFUSION_BIN")
        or shutil.which("clusterfusion")
        or (str(installed) if installed.exists() else None)
    )


PROGRAM = find_program()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN or install the package"
)


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out)


def run(*arguments: object, stdin: bytes = b"", env: dict | None = None, **options) -> Ended:
    """Runs the program with pipes for all three streams."""
    ended = subprocess.run(
        [PROGRAM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT,
        env=os.environ | (env or {}),
        **options,
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Small random weights; the greedy text is noise, but the same noise everywhere."""
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "model", tokenizer="train")


@pytest.fixture(scope="session")
def no_tokenizer(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "ids")


@pytest.fixture(scope="session")
def long_model(tmp_path_factory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("cli") / "long",
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_positions=LONG_CONTEXT,
        tokenizer="train",
    )


@pytest.fixture(scope="session")
def tokenizer(model) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="session")
def oracle(model) -> ReferenceModel:
    return ReferenceModel(model)


# Help.


def test_version():
    ended = run("--version")
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(r"clusterfusion \d+\.\d+\.\d+\n", ended.out)


def test_no_subcommand_shows_the_help_and_is_misuse():
    ended = run()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == run("--help").out
    assert all(f"\n  {name} " in ended.err for name in COMMANDS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_ends_with_an_example_that_works(command, model, tmp_path):
    ended = run(*([command] if command else []), "--help")
    assert (ended.code, ended.err) == (0, "")
    heading, example = ended.out.splitlines()[-2:]
    assert heading == "Example:"
    words = shlex.split(example)
    assert words[:2] == ["clusterfusion", command or "generate"]
    (tmp_path / "novel.txt").write_text(PROMPT * 20)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(model)
    assert run(*words[1:], cwd=tmp_path).code == 0


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_help_names_the_keys_of_the_json_document(command, model):
    arguments = {
        "info": [],
        "bench": ["--contexts", 4, "--tokens", 2, "--repeats", 1],
        "perplexity": ["-p", PROMPT * 2],
    }.get(command, ["-p", PROMPT])
    document = run(command, model, *arguments, "--json").json
    keys = run(command, "--help").out.split("Keys of --json:")[1]
    assert [key for key in document if key not in keys] == []


# generate.


def test_generate_writes_the_greedy_text(model, tokenizer, oracle):
    ended = run("generate", model, "-p", PROMPT, "-n", 12, "--ignore-eos")
    tokens, margins = oracle.greedy(tokenizer.encode(PROMPT).ids, 12)
    assert min(margins) > 1e-4, "a tie: choose another seed"
    assert ended.code == 0
    assert ended.out == tokenizer.decode(tokens) + "\n"


def test_generate_reports_statistics_on_stderr(model, tokenizer):
    ended = run("generate", model, "-p", PROMPT, "-n", 12, "--ignore-eos")
    count = len(tokenizer.encode(PROMPT).ids)
    number = r"[\d.]+"
    assert re.fullmatch(
        r"device: cpu, .*threads.* \(.+\)\n"
        rf"prompt: {count} tokens, first token after {number} .s\n"
        rf"output: 12 tokens \(token_limit\), {number} .s/token, {number} tokens/s, "
        rf"{number} .B/s, {number} % of the read ceiling of {number} .B/s\n",
        ended.err,
    )


def test_generate_quiet(model):
    loud = run("generate", model, "-p", PROMPT, "-n", 4)
    for option in ("--quiet", "--no-stats"):
        ended = run("generate", model, "-p", PROMPT, "-n", 4, option)
        assert (ended.code, ended.out, ended.err) == (0, loud.out, "")


def test_generate_takes_the_prompt_from_anywhere(model, tmp_path):
    arguments = ["generate", model, "-n", 6, "--echo", "-q"]
    expected = run(*arguments, "-p", PROMPT).out
    assert expected.startswith(PROMPT)
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert run(*arguments, "--prompt-file", file).out == expected
    assert run(*arguments, stdin=PROMPT.encode()).out == expected
    assert run(*arguments, stdin=PROMPT.encode() + b"\r\n").out == expected
    assert run(*arguments, "-p", "-", stdin=PROMPT.encode() + b"\n").out == expected
    assert run(*arguments, "-f", "-", stdin=PROMPT.encode() + b"\n").out == expected


def test_generate_keeps_all_but_the_last_newline(model):
    prompt = "It was\n\n"
    document = run("generate", model, "-n", 0, "--json", stdin=prompt.encode()).json
    other = run("generate", model, "-n", 0, "--json", "-p", prompt[:-1]).json
    assert document["prompt_tokens"] == other["prompt_tokens"]


def test_generate_json_holds_what_was_streamed(model, tokenizer):
    arguments = ["generate", model, "-p", PROMPT, "-n", 9, "--ignore-eos", "--seed", 3]
    arguments += ["--temperature", 1.1, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01]
    arguments += ["--repetition-penalty", 1.2, "-q"]
    document = run(*arguments, "--json", "--logprobs", 2).json
    assert run(*arguments).out == document["text"] + "\n"
    assert document["prompt_tokens"] == tokenizer.encode(PROMPT).ids
    assert len(document["tokens"]) == document["statistics"]["new_tokens"] == 9
    assert tokenizer.decode(document["tokens"]) == document["text"]
    assert document["finish_reason"] == "token_limit"
    assert document["statistics"]["prompt_tokens"] == len(document["prompt_tokens"])
    assert document["statistics"]["ceiling_share"] > 0
    assert [entry["token"] for entry in document["logprobs"]] == document["tokens"]
    for entry in document["logprobs"]:
        assert entry["piece"] == tokenizer.id_to_token(entry["token"])
        first, second = entry["top"]
        assert first["logprob"] >= second["logprob"] and first["logprob"] >= entry["logprob"]


def test_generate_logprobs_equal_the_oracle(model, tokenizer, oracle):
    document = run("generate", model, "-p", PROMPT, "-n", 5, "--json", "--logprobs", 3).json
    prompt = tokenizer.encode(PROMPT).ids
    exact = log_softmax(oracle.logits(prompt + document["tokens"]))[len(prompt) - 1 :]
    for row, entry in zip(exact, document["logprobs"], strict=False):
        np.testing.assert_allclose(entry["logprob"], row[entry["token"]], atol=1e-4)
        expected = np.argsort(-row)[:3]
        assert [likely["token"] for likely in entry["top"]] == expected.tolist()


def test_generate_json_lines(model):
    arguments = ["generate", model, "-p", PROMPT, "-n", 7, "--ignore-eos"]
    lines = [json.loads(line) for line in run(*arguments, "--json-lines").out.splitlines()]
    whole = run(*arguments, "--json").json
    *events, end = lines
    assert [event["event"] for event in events] == ["token"] * len(events)
    assert [event["token"] for event in events if "token" in event] == whole["tokens"]
    assert "".join(event["text"] for event in events) == whole["text"]
    assert end.pop("event") == "end"
    assert end.keys() == whole.keys()
    assert end["text"] == whole["text"] and end["tokens"] == whole["tokens"]


def test_generate_seed(model):
    def text(seed: int, threads: int) -> str:
        arguments = ["--temperature", 1, "--seed", seed, "--threads", threads, "-n", 20]
        return run("generate", model, "-p", PROMPT, *arguments).out

    assert text(1, 1) == text(1, 2) != text(2, 1)
    assert text(2**64 - 1, 1) != text(0, 1)


def test_generate_stops(model, tokenizer):
    arguments = ["generate", model, "-p", PROMPT, "-n", 20, "--ignore-eos", "--json"]
    whole = run(*arguments).json
    stop = whole["text"][3:6]
    for extra in (["--stop", stop], ["--stop", "[nowhere]", "--stop", stop]):
        stopped = run(*arguments, *extra).json
        assert stopped["finish_reason"] == "stop_string"
        assert stopped["text"] == whole["text"].split(stop)[0]
    token = whole["tokens"][4]
    stopped = run(*arguments, "--stop-tokens", f"{token}").json
    assert stopped["finish_reason"] == "stop_token"
    assert stopped["tokens"] == whole["tokens"][: whole["tokens"].index(token) + 1]


def test_generate_limits(model):
    arguments = ["generate", model, "-p", PROMPT, "--ignore-eos", "--json"]
    document = run(*arguments, "-n", 0).json
    assert (document["text"], document["tokens"]) == ("", [])
    document = run(*arguments, "-n", 1000, "--context", 40).json
    assert document["finish_reason"] == "context_limit"
    assert len(document["prompt_tokens"]) + len(document["tokens"]) in (40, 41)


def test_generate_kv_dtype(model):
    for dtype in ("float16", "bfloat16", "float32"):
        info = run("info", model, "--kv-dtype", dtype, "--json").json
        assert info["device"]["kv_dtype"] == dtype
        assert run("generate", model, "-p", PROMPT, "-n", 4, "--kv-dtype", dtype).code == 0


def test_generate_without_a_tokenizer(no_tokenizer):
    ended = run("generate", no_tokenizer, "--prompt-tokens", "5,6,7", "-n", 5, "--ignore-eos")
    tokens, margins = ReferenceModel(no_tokenizer).greedy([5, 6, 7], 5)
    assert min(margins) > 1e-4, "a tie: choose another seed"
    assert ended.code == 0
    assert [int(word) for word in ended.out.split()] == tokens
    ended = run("generate", no_tokenizer, "-p", PROMPT)
    assert ended.code == 1
    assert "tokenizer.json" in ended.err


def test_text_that_is_not_utf8_is_read_as_documented_with_a_warning(model):
    broken = b"It was\xff the \xe2\x82 best"
    repaired = broken.decode(errors="replace")
    for command in ("generate", "score", "tokenize"):
        ended = run(command, model, "--json", stdin=broken)
        assert re.search(r"^clusterfusion: warning: .*standard input.*byte 6 \(0xff\)", ended.err)
        whole = run(command, model, "--json", "-p", repaired)
        assert "warning" not in whole.err
        for key in ("prompt_tokens", "tokens"):
            assert ended.json.get(key) == whole.json.get(key)


# score, perplexity, tokenize, info, bench.


def test_score(model, tokenizer, oracle):
    text = 'It was\nthe "best" \N{SNOWMAN}'
    tokens = tokenizer.encode(text).ids
    exact = log_softmax(oracle.logits(tokens))[np.arange(len(tokens) - 1), tokens[1:]]
    document = run("score", model, "-p", text, "--json").json
    assert [entry["token"] for entry in document["tokens"]] == tokens
    assert document["tokens"][0]["logprob"] is None
    logprobs = [entry["logprob"] for entry in document["tokens"][1:]]
    np.testing.assert_allclose(logprobs, exact, atol=1e-4)
    np.testing.assert_allclose(document["total_logprob"], exact.sum(), rtol=1e-5)

    heading, *rows, total = run("score", model, "-p", text).out.splitlines()
    assert heading.split() == ["index", "id", "logprob", "token"]
    assert [int(row.split()[1]) for row in rows] == tokens
    assert r'"\n"' in "".join(rows) and r'"\""' in "".join(rows)
    assert float(total.split()[2]) == pytest.approx(exact.sum(), abs=1e-3)


def test_score_pairs(model, tokenizer, oracle, tmp_path):
    pairs = [("It was", " the best"), ("It was ", "of"), ("It\nwas", " \N{SNOWMAN}")]
    file = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps({"id": i, "context": context, "continuation": continuation})
        for i, (context, continuation) in enumerate(pairs)
    ]
    file.write_text("\n\n".join(lines))
    ended = run("score", model, "--pairs", "-f", file, "--json", "--top", 2)
    assert (ended.code, ended.err) == (0, "")
    documents = [json.loads(line) for line in ended.out.splitlines()]
    totals = []
    for document, (context, continuation) in zip(documents, pairs, strict=True):
        head = tokenizer.encode(context.rstrip()).ids
        tail = tokenizer.encode(context + continuation).ids[len(head) :]
        exact = log_softmax(oracle.logits(head + tail))[len(head) - 1 : -1]
        assert [token["token"] for token in document["tokens"]] == tail
        assert document["is_greedy"] == (exact.argmax(-1) == tail).all()
        chosen = exact[np.arange(len(tail)), tail]
        np.testing.assert_allclose(
            [token["logprob"] for token in document["tokens"]], chosen, atol=1e-4
        )
        totals.append(chosen.sum())
        assert document["total_logprob"] == pytest.approx(totals[-1], rel=1e-5)
        for token, row in zip(document["tokens"], exact, strict=True):
            best = np.argsort(-row)[:2].tolist()
            assert [likely["token"] for likely in token["top"]] == best

    heading, *rows, total = run("score", model, "--pairs", stdin=file.read_bytes()).out.splitlines()
    assert heading.split() == ["index", "tokens", "logprob", "greedy"]
    assert [float(row.split()[2]) for row in rows] == pytest.approx(totals, abs=1e-3)
    assert float(total.split()[2]) == pytest.approx(sum(totals), abs=1e-3)
    assert "in 3 pairs" in total


@pytest.mark.parametrize(
    ("text", "arguments", "message", "code"),
    [
        ("", [], "empty", 2),
        ("\n \n", [], 'standard input has no pair; expected lines {"context": "...', 1),
        ('\n{"context": "a"}', [], 'standard input, line 2 has no key "continuation"', 1),
        ('{"context": "a", "continuation": 5}', [], 'line 1: "continuation".*string.*5', 1),
        ('{"context": "a", "continuation": "b"', [], "line 1: broken JSON", 1),
        ('["a", "b"]', [], "line 1.*object", 1),
        ('{"context": "a", "continuation": ""}', [], "line 1: the continuation has no token", 1),
        (
            json.dumps({"context": "x y" * 300, "continuation": "b"}),
            [],
            "line 1: .* at most 257",
            1,
        ),
        ('{"context": "a", "continuation": "b"}', ["--top", 3], "--top needs", 2),
        ('{"context": "a", "continuation": "b"}', ["--no-special-tokens"], "is for one text", 2),
    ],
)
def test_score_of_wrong_pairs(model, text, arguments, message, code):
    ended = run("score", model, "--pairs", *arguments, stdin=text.encode())
    assert (ended.code, ended.out) == (code, "")
    assert re.search(message, ended.err), ended.err


def test_perplexity(model, tokenizer, oracle, tmp_path):
    """A text that fits one window has the perplexity of its score; else windows slide."""
    text = (PROMPT + ", ") * 6
    tokens = tokenizer.encode(text).ids
    file = tmp_path / "text"
    file.write_text(text)
    document = run("perplexity", model, "-f", file, "--json").json
    exact = log_softmax(oracle.logits(tokens))[np.arange(len(tokens) - 1), tokens[1:]]
    assert document["mean_nll"] == pytest.approx(-exact.mean(), rel=1e-4)
    assert document["perplexity"] == pytest.approx(math.exp(-exact.mean()), rel=1e-4)
    bits = -exact.sum() / math.log(2) / len(tokenizer.decode(tokens[1:]).encode())
    assert document["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert document["scored_tokens"] == len(tokens) - 1
    assert document["total_tokens"] == len(tokens)

    assert (
        run("perplexity", model, "--json", stdin=text.encode()).json["perplexity"]
        == (document["perplexity"])
    )
    ended = run("perplexity", model, "-f", file)
    assert ended.out.startswith(f"perplexity {document['perplexity']:.4f}\n")
    assert ended.err == ""
    slid = run("perplexity", model, "-f", file, "--context", 16, "--stride", 4, "--json").json
    assert slid["perplexity"] != document["perplexity"]
    assert slid["scored_tokens"] == len(tokens) - 1
    arguments = ["--context", 16, "--stride", 16, "--method", "transformers-docs"]
    ended = run("perplexity", model, "-f", file, *arguments)
    assert ended.code == 0 and "bits/byte" not in ended.out


AWKWARD_TEXTS = [
    "a",
    PROMPT,
    " \n\n\ttabs ",
    'caf\N{LATIN SMALL LETTER E WITH ACUTE} "x"',
    "\x00\x1b",
]


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_tokenize(model, tokenizer, text):
    ids = tokenizer.encode(text).ids
    for path in (model, model / "tokenizer.json"):
        ended = run("tokenize", path, stdin=text.encode())
        assert (ended.code, ended.err) == (0, "")
        assert [int(word) for word in ended.out.split()] == ids
    document = run("tokenize", model, "--json", stdin=text.encode()).json
    assert document == {
        "count": len(ids),
        "tokens": ids,
        "pieces": [tokenizer.id_to_token(token) for token in ids],
    }
    assert run("tokenize", model, "--count", stdin=text.encode()).out == f"{len(ids)}\n"
    table = run("tokenize", model, "--pieces", stdin=text.encode()).out.splitlines()
    assert [int(row.split()[0]) for row in table] == ids
    assert all(row.isprintable() for row in table)


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
@pytest.mark.parametrize("separator", [" ", ",", ", ", "\n"])
def test_tokenize_decode(model, tokenizer, text, separator):
    ids = tokenizer.encode(text).ids
    listed = separator.join(map(str, ids)).encode()
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    assert run("tokenize", model, "--decode", stdin=listed).out == expected
    assert run("tokenize", model, "--decode", "--json", stdin=listed).json == {"text": expected}
    assert run("tokenize", model, "--decode", stdin=json.dumps(ids).encode()).out == expected


def test_tokenize_special_tokens(model):
    assert run("tokenize", model, "-p", "a<|endoftext|>").out.split()[-1] == "0"
    assert run("tokenize", model, "--decode", "-p", "0").out == "<|endoftext|>"
    assert run("tokenize", model, "--decode", "--skip-special-tokens", "-p", "0").out == ""


def test_info(model, no_tokenizer):
    document = run("info", model, "--json").json
    config = json.loads((model / "config.json").read_text())
    shape = document["model"]
    assert shape["hidden_size"] == config["hidden_size"]
    assert shape["num_layers"] == config["num_hidden_layers"]
    assert shape["num_heads"] == config["num_attention_heads"]
    assert shape["vocab_size"] == config["vocab_size"]
    assert shape["dtype"] == "float16"
    reference = ReferenceModel(model)
    parameters = sum(tensor.size for tensor in reference.weights.values())
    assert shape["num_parameters"] == parameters
    assert shape["total_bytes"] == 2 * parameters
    embedding = reference.weights["embed_in.weight"]
    assert shape["bytes_per_token"] == 2 * (parameters - embedding.size + embedding.shape[1])
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    assert document["device"]["kv_bytes_per_position"] == 2 * layers * hidden * 4
    assert document["tokenizer"]["special_tokens"] == 1
    assert run("info", no_tokenizer, "--json").json["tokenizer"] is None
    for path in (model, no_tokenizer):
        ended = run("info", path, "--check")
        assert (ended.code, ended.err) == (0, "")
        assert f"{parameters:,} parameters" in ended.out


def test_bench(no_tokenizer):
    arguments = ["bench", no_tokenizer, "--tokens", 3, "--repeats", 3]
    document = run(*arguments, "--contexts", "1,8 200", "--json").json
    assert [row["context"] for row in document["contexts"]] == [1, 8, 200]
    ceiling = document["read_ceiling_bytes_per_second"]
    assert ceiling > 0
    for row in document["contexts"]:
        for key in ("prefill_tokens_per_second", "seconds_per_token", "bytes_per_second"):
            assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
        assert row["ceiling_share"] == pytest.approx(row["bytes_per_second"]["median"] / ceiling)
    ended = run(*arguments)
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["16", "128", "255"], "this model's context is 256"


def test_bench_counts_the_bytes_of_a_step(no_tokenizer):
    """Weights once and the KV cache up to the step's own position: the same at any speed."""
    arguments = ["bench", no_tokenizer, "--contexts", "1,200", "--tokens", 2, "--repeats", 1]
    document = run(*arguments, "--json").json
    device = run("info", no_tokenizer, "--json").json["device"]
    for row in document["contexts"]:
        read = row["bytes_per_second"]["max"] * row["seconds_per_token"]["min"]
        cache = device["kv_bytes_per_position"] * (row["context"] + 1)
        assert read == pytest.approx(document["bytes_per_token"] + cache)


def test_device_is_named_with_the_reason(model):
    """Which device, and why: asked for, or what "auto" found."""
    for option, reason in (("cpu", "asked for"), ("auto", "GPU|CUDA")):
        device = run("info", model, "--device", option, "--json").json["device"]
        assert re.search(reason, device["reason"])
        expected = f"{device['name']}, {device['description']} ({device['reason']})"
        assert f"device      {expected}\n" in run("info", model, "--device", option).out
        ended = run("generate", model, "--device", option, "-p", PROMPT, "-n", 2)
        assert f"device: {expected}\n" in ended.err
        ended = run("bench", model, "--device", option, "--contexts", 4, "-n", 2, "--repeats", 1)
        assert ended.out.startswith(expected)


def test_timeline_needs_a_gpu(model, tmp_path):
    """Without one nothing is written; a path that cannot be written is known before the work."""
    file = tmp_path / "trace.json"
    arguments = ["bench", model, "--device", "cpu", "--timeline"]
    assert_one_error(run(*arguments, file), 1, 'timeline.*GPU.*"cpu"')
    assert not file.exists()
    file.write_text("kept")
    assert_one_error(run(*arguments, file), 1, 'timeline.*GPU.*"cpu"')
    assert file.read_text() == "kept"
    nowhere = tmp_path / "nowhere" / "trace.json"
    assert_one_error(run(*arguments, nowhere), 1, "--timeline.*nowhere.*No such")


# Misuse and failure.


def set_up(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


MISUSES = {
    "unknown command": (["frobnicate"], '"frobnicate"; expected one of generate, score'),
    "misspelt command": (["tokenise", "MODEL", "-p", "x"], "did you mean tokenize"),
    "unknown option": (["generate", "MODEL", "--frob", "1"], "--frob"),
    "unknown option of generate": (["generate", "MODEL", "--frob"], "generate --help"),
    "no model": (["generate"], "MODEL"),
    "no value": (["generate", "MODEL", "--top-k"], "--top-k"),
    "not a number": (["generate", "MODEL", "-p", "x", "-n", "many"], 'number.*"many"'),
    "hexadecimal": (["generate", "MODEL", "-p", "x", "--top-k", "0x10"], '--top-k.*"0x10"'),
    "not finite": (
        ["generate", "MODEL", "-p", "x", "--temperature", "nan"],
        '--temperature.*"nan"',
    ),
    "negative tokens": (["generate", "MODEL", "-p", "x", "-n", "-1"], "--max-new-tokens.*-1"),
    "negative temperature": (
        ["generate", "MODEL", "-p", "x", "--temperature=-1"],
        "--temperature.*-1",
    ),
    "top-p": (["generate", "MODEL", "-p", "x", "--top-p", "1.5"], "--top-p.*1.5"),
    "min-p": (["generate", "MODEL", "-p", "x", "--min-p", "-0.5"], "--min-p.*-0.5"),
    "penalty": (
        ["generate", "MODEL", "-p", "x", "--repetition-penalty", "0"],
        "--repetition-penalty",
    ),
    "seed": (["generate", "MODEL", "-p", "x", "--seed=-2"], f'--seed.*0 to {2**64 - 1}.*"-2"'),
    "huge seed": (["generate", "MODEL", "-p", "x", "--seed", str(2**64)], f"--seed.*{2**64 - 1}"),
    "logprobs": (["generate", "MODEL", "-p", "x", "--logprobs", "1"], "--logprobs.*--json"),
    "many logprobs": (
        ["generate", "MODEL", "-p", "x", "--json", "--logprobs", "101"],
        "--logprobs.*101",
    ),
    "empty prompt": (["generate", "MODEL", "-p", ""], "-p.*empty|--prompt.*empty"),
    "empty stdin": (["generate", "MODEL"], "standard input is empty"),
    "two prompts": (["generate", "MODEL", "-p", "x", "-f", "y"], "--prompt excludes --prompt-file"),
    "empty stop": (["generate", "MODEL", "-p", "x", "--stop", ""], "--stop"),
    "stop token": (
        ["generate", "MODEL", "-p", "x", "--stop-tokens", "1,x"],
        "--stop-tokens.*entry 1",
    ),
    "big stop token": (
        ["generate", "MODEL", "-p", "x", "--stop-tokens", "9999"],
        r"--stop-tokens\[0\] is 9999.*320",
    ),
    "no stop tokens": (
        ["generate", "MODEL", "-p", "x", "--stop-tokens", ""],
        "--stop-tokens.*none",
    ),
    "no prompt tokens": (["generate", "MODEL", "--prompt-tokens", ""], "--prompt-tokens.*none"),
    "short context": (
        ["generate", "MODEL", "-p", "x", "--context", "1"],
        r"context of 1 positions.*raise --context \(the model allows 256\)",
    ),
    "prompt token": (["generate", "MODEL", "--prompt-tokens", "1,-2"], "--prompt-tokens.*entry 1"),
    "big prompt token": (
        ["generate", "MODEL", "--prompt-tokens", "1,9999"],
        r"--prompt-tokens\[1\] is 9999.*320",
    ),
    "long prompt": (["generate", "MODEL", "-p", "x y" * 300], "prompt has .* tokens.*256"),
    "context": (["generate", "MODEL", "-p", "x", "--context", "5000"], "--context.*256.*5000"),
    "device": (["generate", "MODEL", "-p", "x", "--device", "tpu"], "--device.*tpu"),
    "mode": (["generate", "MODEL", "-p", "x", "--mode", "fast"], "--mode.*fast"),
    "kv dtype": (["generate", "MODEL", "-p", "x", "--kv-dtype", "int8"], "--kv-dtype.*int8"),
    "threads": (["generate", "MODEL", "-p", "x", "--threads", "-2"], "--threads.*-2"),
    "json twice": (["generate", "MODEL", "-p", "x", "--json", "--json-lines"], "--json"),
    "short score": (["score", "MODEL", "-p", "a"], "2 tokens"),
    "long score": (["score", "MODEL", "-p", "x y" * 300], "256"),
    "context of 1": (["perplexity", "MODEL", "-p", "x y z", "--context", "1"], "context.*256.*1"),
    "stride": (["perplexity", "MODEL", "-p", "x", "--stride", "x"], '--stride.*"x"'),
    "stride > context": (
        ["perplexity", "MODEL", "-p", "x y z", "--context", "8", "--stride", "9"],
        "stride.*8.*9",
    ),
    "ids": (["tokenize", "MODEL", "--decode", "-p", "1 two"], 'entry 1 is "two"'),
    "big id": (["tokenize", "MODEL", "--decode", "-p", f"1 {2**31}"], f"{2**31}"),
    "contexts": (["bench", "MODEL", "--contexts", "16,abc"], '--contexts.*entry 1 is "abc"'),
    "no contexts": (["bench", "MODEL", "--contexts", ""], "--contexts"),
    "context too long": (["bench", "MODEL", "--contexts", "16,256"], "--contexts.*entry 1.*256"),
    "bench tokens": (["bench", "MODEL", "--tokens", "0"], '--tokens.*at least 1.*"0"'),
    "repeats": (["bench", "MODEL", "--repeats", "0"], '--repeats.*at least 1.*"0"'),
}


def assert_one_error(ended: Ended, code: int, pattern: str) -> None:
    assert ended.code == code, ended.err
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("clusterfusion: error: ")
    assert re.search(pattern, line), line


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(name, model):
    arguments, pattern = MISUSES[name]
    ended = run(*[model if word == "MODEL" else word for word in arguments])
    assert_one_error(ended, 2, pattern)


FAILURES: dict[str, tuple[Callable[[Path, Path], list], str]] = {
    "no folder": (lambda tmp, model: ["info", tmp / "nowhere"], "nowhere"),
    "empty folder": (lambda tmp, model: ["info", set_up(tmp / "empty")], "config.json"),
    "file as folder": (lambda tmp, model: ["info", model / "config.json"], "config.json"),
    "broken config": (
        lambda tmp, model: ["info", set_up(tmp / "m", config_json=b"{")],
        "config.json",
    ),
    "no tokenizer": (
        lambda tmp, model: ["tokenize", set_up(tmp / "m"), "-p", "x"],
        "tokenizer.json",
    ),
    "broken tokenizer": (
        lambda tmp, model: ["tokenize", set_up(tmp / "m", tokenizer_json=b"[]"), "-p", "x"],
        "tokenizer.json",
    ),
    "no prompt file": (
        lambda tmp, model: ["generate", model, "-f", tmp / "no.txt"],
        "no.txt.*No such",
    ),
    "folder as prompt": (lambda tmp, model: ["generate", model, "-f", tmp], "directory"),
    "folder as text": (lambda tmp, model: ["perplexity", model, "-f", tmp], "directory"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure(name, model, tmp_path):
    arguments, pattern = FAILURES[name]
    assert_one_error(run(*arguments(tmp_path, model)), 1, pattern)


@pytest.mark.parametrize("command", ["score", "perplexity"])
def test_text_commands_need_a_tokenizer(command, no_tokenizer):
    assert_one_error(run(command, no_tokenizer, "-p", PROMPT), 1, "tokenizer.json")


@pytest.mark.skipif(os.geteuid() != 0 and os.name != "posix", reason="needs file permissions")
def test_unreadable_file(model, tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text("secret")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read every file")
    assert_one_error(run("generate", model, "-f", file), 1, "secret.txt.*Permission denied")


def test_endless_text_is_refused(model):
    assert_one_error(run("tokenize", model, "-f", "/dev/zero"), 2, "/dev/zero.*268435456 bytes")


# Streams: full disks, closed pipes, terminals, signals.

ALL_COMMANDS = [
    ["--help"],
    ["--version"],
    ["generate", "MODEL", "-p", PROMPT, "-n", "4"],
    ["generate", "MODEL", "-p", PROMPT, "-n", "4", "--json"],
    ["score", "MODEL", "-p", PROMPT],
    ["perplexity", "MODEL", "-p", PROMPT],
    ["tokenize", "MODEL", "-p", PROMPT],
    ["info", "MODEL"],
    ["bench", "MODEL", "--contexts", "4", "--tokens", "2", "--repeats", "1"],
    ["completion", "bash"],
    ["man-page"],
]


def command_line(arguments: list[str], model: Path) -> list[str]:
    return [PROGRAM, *(str(model) if word == "MODEL" else word for word in arguments)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", ALL_COMMANDS, ids=" ".join)
def test_full_disk(arguments, model):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command_line(arguments, model),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
        )
    assert_one_error(Ended(ended.returncode, "", ended.stderr), 1, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_standard_error_does_not_matter(model):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command_line(["generate", "MODEL", "-p", PROMPT, "-n", "4"], model),
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=TIMEOUT,
        )
    assert (ended.returncode, bool(ended.stdout)) == (0, True)


@pytest.mark.parametrize("arguments", ALL_COMMANDS, ids=" ".join)
def test_closed_pipe_ends_quietly(arguments, model):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        command_line(arguments, model), stdout=writer, stderr=subprocess.PIPE, timeout=TIMEOUT
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_pipe_closed_on_the_way_ends_the_generation(long_model):
    """`| head -c 10` while tokens for minutes are still to come."""
    arguments = ["generate", "MODEL", "-p", PROMPT, "-n", "50000", "--ignore-eos"]
    process = subprocess.Popen(
        command_line(arguments, long_model), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    assert process.wait(TIMEOUT) == 0
    assert process.stderr.read() == b""


class Terminal:
    """The program with a pseudo-terminal as its controlling terminal and all three streams."""

    def __init__(self, arguments: list[str], model: Path, env: dict | None = None):
        command = command_line(arguments, model)
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", **(env or {})})
        self.seen = b""

    def read(self) -> bool:
        """Adds what comes within a second to `seen`; False when the program has ended."""
        if not select.select([self.descriptor], [], [], 1)[0]:
            return True
        try:
            chunk = os.read(self.descriptor, 65536)
        except OSError:  # Linux: the other end is closed
            return False
        self.seen += chunk
        return bool(chunk)

    def wait_for(self, pattern: bytes) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not re.search(pattern, self.seen):
            assert self.read() and time.monotonic() < deadline, self.seen

    def press(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def interrupt_prompt(self) -> None:
        """Presses Ctrl-C once the program sleeps in its wait for keys, where /proc shows that.

        A signal between Python's prompt and that wait is only noticed with the next key
        (readline_until_enter_or_signal in CPython's Modules/readline.c).
        """
        if Path("/proc/self/stat").exists():
            wait_until(lambda: process_state(self.pid) == "S")
        self.press(b"\x03")

    def end(self) -> int:
        """Reads the rest and returns the exit code, or minus the signal that killed it."""
        deadline = time.monotonic() + TIMEOUT
        while self.read():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_ends_the_text_with_statistics(long_model):
    arguments = ["generate", "MODEL", "-p", PROMPT, "-n", "50000", "--ignore-eos", "--echo"]
    terminal = Terminal(arguments, long_model)
    terminal.wait_for(PROMPT.encode() + rb"[^\0]{20}")
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert re.search(
        rb"\r\ndevice: .*\r\nprompt: \d+ tokens, first token after .*\r\n"
        rb"output: [\d,]+ tokens \(cancelled\), .*tokens/s.*\r\n$",
        terminal.seen,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def process_state(pid: int) -> str:
    """R while it runs, S while it sleeps, ...: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def catches_sigint(pid: int) -> bool:
    """Whether the program has a handler of SIGINT just now, so whether generation has begun."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << (signal.SIGINT - 1))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="/proc shows which signals are caught"
)


def start_in_prefill(model: Path, *arguments: str) -> subprocess.Popen:
    """The program at the beginning of a prompt that takes long."""
    process = subprocess.Popen(
        command_line(["generate", "MODEL", "-n", "9", *arguments], model),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"aq" * (LONG_CONTEXT // 2 - 100))
    process.stdin.close()
    wait_until(lambda: catches_sigint(process.pid))
    return process


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_prefill(long_model, number):
    process = start_in_prefill(long_model, "--json")
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait(TIMEOUT) == 128 + number
    document = json.loads(out)
    assert document["finish_reason"] == "cancelled"
    assert document["tokens"] == []
    assert re.fullmatch(
        rb"device: .*\nprompt: .*\noutput: 0 tokens \(cancelled\)\n", process.stderr.read()
    )


@needs_proc
def test_second_signal_kills(long_model):
    """Here while the program waits for a reader that does not read."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    arguments = ["generate", "MODEL", "-p", PROMPT, "-n", "50000", "--ignore-eos", "--json-lines"]
    process = subprocess.Popen(command_line(arguments, long_model), stdout=writer)
    os.close(writer)

    def bytes_waiting() -> int:
        return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)

    wait_until(lambda: bytes_waiting() > size - 200)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not catches_sigint(process.pid))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == -signal.SIGINT
    os.close(reader)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("context", ["64", "0"])  # between windows, and in the middle of one
def test_interrupted_perplexity_has_no_result(long_model, tmp_path, context, number):
    text = tmp_path / "text"
    text.write_bytes(b"aq" * 1_000_000)
    process = subprocess.Popen(
        command_line(["perplexity", "MODEL", "-f", str(text), "--context", context], long_model),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: catches_sigint(process.pid))
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 128 + number
    assert process.stdout.read() == b""
    assert re.search(
        rb"error: interrupted (after \d+ of \d+|before the first window of) tokens.*; no result",
        process.stderr.read(),
    )


@needs_proc
@pytest.mark.parametrize("repeats", [2, 25_000])  # between pairs, and in the middle of one
def test_interrupted_pairs_have_no_result(long_model, tmp_path, repeats):
    file = tmp_path / "pairs.jsonl"
    pair = json.dumps({"context": "aq", "continuation": "aq" * repeats})
    file.write_text("\n".join([pair] * (100_000 // repeats)))
    process = subprocess.Popen(
        command_line(["score", "MODEL", "--pairs", "-f", str(file)], long_model),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: catches_sigint(process.pid))
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 128 + signal.SIGINT
    assert process.stdout.read() == b""
    error = process.stderr.read()
    assert re.search(rb"error: interrupted after \d+ of \d+ pairs; no result", error)


def test_no_prompt_on_a_terminal_is_misuse(model):
    terminal = Terminal(["generate", "MODEL"], model)
    assert terminal.end() == 2
    assert re.search(rb"no text: give --prompt .*--prompt-file.*standard input", terminal.seen)


def test_colour_only_on_a_terminal(tmp_path):
    def seen(**env: str) -> bytes:
        terminal = Terminal(["info", "MODEL"], tmp_path / "nowhere", env)
        assert terminal.end() == 1
        return terminal.seen

    assert b"\x1b[1;31merror:\x1b[0m" in seen()
    assert b"\x1b" in seen(NO_COLOR="")
    assert b"\x1b" not in seen(NO_COLOR="1")
    assert b"\x1b" not in seen(TERM="dumb")
    assert "\x1b" not in run("info", tmp_path / "nowhere").err


def test_progress_only_on_a_terminal(model):
    arguments = ["perplexity", "MODEL", "-p", PROMPT * 3, "--context", "16"]
    terminal = Terminal(arguments, model)
    assert terminal.end() == 0
    assert re.search(rb"perplexity \[#*\s*\]", terminal.seen)
    erased = terminal.seen.split(b"\r\x1b[K")[-1]
    assert erased.startswith(b"perplexity ") and b"[" not in erased
    assert b"loading" not in terminal.seen, "what takes no time shows no progress"
    quiet = Terminal([*arguments, "--quiet"], model)
    assert quiet.end() == 0
    assert b"\x1b" not in quiet.seen
