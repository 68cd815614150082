"""The Python API on small random checkpoints: options, arrays, errors, threads, cancellation."""

import copy
import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
import tokenizers
import tvm_ffi
from checkpoints import write_random_checkpoint
from clusterfusion import Engine, Event, Tokenizer, _native
from reference_model import ReferenceModel, log_softmax, relative_error

VOCAB = 400
LONGEST = 300
TEXT = "It was the best of times"
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        vocab_size=VOCAB,
        max_positions=LONGEST,
        tokenizer="train",
        seed=5,
    )


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine(folder)


@pytest.fixture(scope="module")
def oracle(folder) -> ReferenceModel:
    return ReferenceModel(folder)


@pytest.fixture(scope="module")
def long_engine(tmp_path_factory) -> Engine:
    """Tiny, with a context that takes long to fill."""
    return Engine(
        write_random_checkpoint(
            tmp_path_factory.mktemp("long"),
            hidden_size=16,
            num_layers=1,
            num_heads=1,
            max_positions=200_000,
        )
    )


# What an engine says about itself.


def test_config(engine, folder):
    given = json.loads((folder / "config.json").read_text())
    config = engine.config
    assert config.vocab_size == given["vocab_size"]
    assert config.hidden_size == given["hidden_size"]
    assert config.num_layers == given["num_hidden_layers"]
    assert config.num_heads == given["num_attention_heads"]
    assert config.head_dim * config.num_heads == config.hidden_size
    assert config.intermediate_size == given["intermediate_size"]
    assert config.max_positions == given["max_position_embeddings"]
    assert config.rotary_dim == config.head_dim * given["rotary_pct"]
    assert config.rope_theta == given["rotary_emb_base"]
    assert config.layer_norm_eps == given["layer_norm_eps"]
    assert config.hidden_act == given["hidden_act"]
    assert config.parallel_residual == given["use_parallel_residual"]
    assert config.attention_bias == given["attention_bias"]
    assert config.tied_embeddings == given["tie_word_embeddings"]
    assert config.dtype == given["torch_dtype"]
    assert (config.bos_token, config.eos_tokens) == (0, (0,))


def test_info(engine, folder):
    info = engine.info
    assert Path(info.path) == folder
    assert engine.device == info.device == "cpu"
    assert info.device_description
    assert info.device_reason
    assert info.kv_dtype == "float32"
    assert info.kv_bytes_per_position == 2 * 4 * engine.config.hidden_size * 2
    assert info.max_positions == LONGEST
    assert info.total_bytes == 2 * info.num_parameters
    assert 0 < info.bytes_per_token < info.total_bytes
    assert info.has_tokenizer
    assert repr(engine) == f"Engine({str(folder)!r}, device='cpu')"
    assert all(type(value) in (str, int, bool) for value in astuple(info))


def test_engine_options(folder):
    engine = Engine(str(folder), "cpu", threads=1, context=40, kv_dtype="float16")
    assert engine.info.max_positions == 40
    assert engine.info.kv_dtype == "float16"
    assert engine.info.kv_bytes_per_position == 2 * 2 * engine.config.hidden_size * 2
    result = engine.generate([1] * 30, max_new_tokens=100, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason) == (10, "context_limit")


def test_modes_are_the_same_on_the_cpu(folder):
    texts = [
        Engine(folder, "cpu", mode=mode).generate([1, 2, 3], max_new_tokens=8).tokens
        for mode in ("latency", "throughput")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="mode: expected 'latency' or 'throughput', found 'fast'"):
        Engine(folder, "cpu", mode="fast")


def test_progress(folder):
    """On the CPU weights are used in place: loading has ended as soon as it is reported."""
    seen = []
    engine = Engine(folder, "cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(engine.info.total_bytes,) * 2]
    Engine(folder, "cpu", progress=None)
    with pytest.raises(TypeError, match="progress: expected a callable, found int"):
        Engine(folder, "cpu", progress=3)


@pytest.mark.parametrize("error", [LookupError("enough"), KeyboardInterrupt()], ids=repr)
def test_progress_that_raises_ends_the_loading(folder, error):
    def progress(done, total):
        raise error

    with pytest.raises(type(error)) as raised:
        Engine(folder, "cpu", progress=progress)
    assert raised.value is error


def test_read_ceiling(folder):
    engine = Engine(folder)
    before = engine.generate([1], max_new_tokens=3, ignore_eos=True).statistics
    assert (before.read_ceiling_bytes_per_second, before.ceiling_share) == (0, 0)
    ceiling = engine.measure_read_ceiling()
    assert ceiling > 0
    after = engine.generate([1], max_new_tokens=3, ignore_eos=True).statistics
    assert after.read_ceiling_bytes_per_second == ceiling
    assert after.ceiling_share == pytest.approx(after.bytes_per_second / ceiling)


# The tokenizer. tests/python/test_tokenizer.py has the proof against `tokenizers`.


def test_tokenizer(engine, folder):
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ["", TEXT, "naïve café\n\n  ", "a<|endoftext|>b", "é 日本 \U0001f600", "\0"]
    for tokenizer in (engine.tokenizer, Tokenizer(folder), Tokenizer(folder / "tokenizer.json")):
        for text in texts:
            ids = tokenizer.encode(text)
            assert ids == peer.encode(text).ids
            assert all(type(id_) is int for id_ in ids)
            assert tokenizer.encode(text.encode()) == ids
            assert tokenizer.decode(ids) == peer.decode(ids)
            assert tokenizer.decode(np.array(ids, np.int64), skip_special_tokens=False) == text
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch([]) == []
        assert tokenizer.vocab_size == peer.get_vocab_size()
        for token, id_ in peer.get_vocab().items():
            assert tokenizer.token_to_id(token) == id_
            assert tokenizer.id_to_token(id_) == token
        assert tokenizer.token_to_id("no such token") is None
    assert engine.encode(TEXT) == peer.encode(TEXT).ids
    assert engine.decode(engine.encode(TEXT)) == TEXT


def test_ill_formed_utf8(engine):
    for data in (b"a\xffb", b"\xe6\x97", b"\xf0\x9f\x98 x", b"\xc0\x80", b"\xed\xa0\x80"):
        expected = engine.encode(data.decode(errors="replace"))
        assert engine.encode(data) == expected
        assert engine.tokenizer.encode_batch([data, b""]) == [expected, []]


def test_tokenizer_arguments(engine):
    tokenizer = engine.tokenizer
    with pytest.raises(TypeError, match="text: expected str or bytes, found int"):
        tokenizer.encode(3)
    with pytest.raises(TypeError, match="texts: expected a sequence of str or bytes, found str"):
        tokenizer.encode_batch("text")
    with pytest.raises(ValueError, match=r"texts\[1\].*lone surrogate U\+DC80 at index 2"):
        tokenizer.encode_batch(["a", "ab\udc80"])
    assert tokenizer.decode([1, 2, 400]) == tokenizer.decode([1, 2]), "as tokenizers does"
    with pytest.raises(IndexError, match=r"tokens\[2\] is 400"):
        engine.decode([1, 2, 400])
    with pytest.raises(IndexError, match="-1"):
        tokenizer.id_to_token(-1)
    with pytest.raises(TypeError, match="add_special_tokens: expected bool, found int"):
        tokenizer.encode("a", add_special_tokens=1)


# Generating.


def test_generation(engine, oracle):
    prompt = engine.encode(TEXT)
    expected, margins = oracle.greedy(prompt, 12)
    assert min(margins) > 1e-4, "a tie: choose another seed"
    result = engine.generate(TEXT, max_new_tokens=12, ignore_eos=True)
    assert result.prompt_tokens == prompt
    assert result.tokens == expected
    assert result.text == engine.decode(expected)
    assert result.finish_reason == "token_limit"
    assert result.logprobs is None
    statistics = result.statistics
    assert (statistics.prompt_tokens, statistics.new_tokens) == (len(prompt), 12)
    assert 0 < statistics.prefill_seconds <= statistics.time_to_first_token_seconds
    assert statistics.decode_seconds / 11 == pytest.approx(statistics.seconds_per_token)
    assert statistics.tokens_per_second == pytest.approx(1 / statistics.seconds_per_token)
    assert statistics.bytes_per_second > 0
    assert type(result.text) is type(result.finish_reason) is str
    assert all(type(token) is int for token in result.tokens + result.prompt_tokens)


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", [TEXT, [TEXT, "a", [5, 6, 7]]], ids=["one", "batch"])
def test_stream_equals_generate(engine, prompt, sampling):
    options = {**sampling, "max_new_tokens": 40, "logprobs": 3}
    expected = engine.generate(prompt, **options)
    expected = expected if isinstance(expected, list) else [expected]
    stream = engine.stream(prompt, **options)
    assert iter(stream) is stream
    events = list(stream)
    for index, result in enumerate(expected):
        own = [event for event in events if event.index == index]
        assert "".join(event.text for event in own) == result.text
        assert [event.token for event in own if event.token is not None] == result.tokens
        assert [event.logprobs for event in own if event.token is not None] == result.logprobs
        reasons = [event.finish_reason for event in own]
        assert reasons == [None] * (len(own) - 1) + [result.finish_reason]
        assert without_times(stream.results[index]) == without_times(result)
    assert list(stream) == []


def without_times(result: clusterfusion.Generation) -> tuple:
    return result.text, result.tokens, result.prompt_tokens, result.finish_reason, result.logprobs


def test_batch_equals_its_members(engine):
    prompts = [TEXT, b"a \xff b", "x", [9], np.arange(50), (1, 2, 3)]
    for sampling in ({}, SAMPLED):
        batch = engine.generate(prompts, max_new_tokens=30, **sampling)
        alone = [engine.generate(prompt, max_new_tokens=30, **sampling) for prompt in prompts]
        assert list(map(without_times, batch)) == list(map(without_times, alone))
    (single,) = engine.generate((TEXT,), max_new_tokens=3)
    assert single.tokens == engine.generate(TEXT, max_new_tokens=3).tokens


def test_seed(engine, folder):
    def tokens(seed, engine=engine, prompt=TEXT):
        result = engine.generate(prompt, **{**SAMPLED, "seed": seed})
        return [r.tokens for r in result] if isinstance(result, list) else result.tokens

    seeds = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    texts = [tokens(seed) for seed in seeds]
    assert len({tuple(text) for text in texts}) == len(seeds)
    assert [tokens(seed) for seed in seeds] == texts
    assert tokens(seeds, prompt=[TEXT] * len(seeds)) == texts
    assert tokens(3, prompt=[TEXT, TEXT]) == [tokens(3)] * 2
    for threads in (1, 2, 5):
        assert tokens(seeds[1], Engine(folder, threads=threads)) == texts[1]
    with pytest.raises(
        ValueError, match="seed: expected one, or one for each of 2 prompts; found 3"
    ):
        tokens([1, 2, 3], prompt=[TEXT, TEXT])


def test_filters_that_leave_the_likeliest_token(engine):
    greedy = engine.generate(TEXT, max_new_tokens=30).tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        options = {"temperature": 2.0, "seed": 3, **narrow}
        assert engine.generate(TEXT, max_new_tokens=30, **options).tokens == greedy
    hot = engine.generate(TEXT, max_new_tokens=30, temperature=2.0, seed=3, ignore_eos=True)
    assert hot.tokens != greedy


def test_repetition_penalty(engine):
    plain = engine.generate([1, 2, 3], max_new_tokens=100, ignore_eos=True)
    assert len(set(plain.tokens)) < 100
    options = {"max_new_tokens": 100, "ignore_eos": True, "repetition_penalty": 1e9}
    penalized = engine.generate([1, 2, 3], **options)
    # A penalized score of a disliked token is hugely negative, that of a liked one nearly zero.
    liked = [token for token in penalized.tokens if penalized.tokens.count(token) > 1]
    assert len(set(penalized.tokens)) > len(set(plain.tokens))
    assert len(liked) < 100


def test_stop(engine):
    free = engine.generate(TEXT, max_new_tokens=40, **SAMPLED)
    middle = free.text[10:14]
    cut = free.text[: free.text.index(middle)]
    for stop in (middle, [middle], ["no such text", middle.encode()], (middle,)):
        result = engine.generate(TEXT, max_new_tokens=40, stop=stop, **SAMPLED)
        assert (result.text, result.finish_reason) == (cut, "stop_string")
        assert result.tokens == free.tokens[: len(result.tokens)]
        streamed = engine.stream(TEXT, max_new_tokens=40, stop=stop, **SAMPLED)
        assert "".join(event.text for event in streamed) == cut
    for stop in (None, [], "no such text"):
        result = engine.generate(TEXT, max_new_tokens=40, stop=stop, **SAMPLED)
        assert without_times(result) == without_times(free)


def test_stop_tokens(engine):
    free = engine.generate(TEXT, max_new_tokens=40, **SAMPLED).tokens
    last = free[20]
    for stop_tokens in ([last], np.array([last]), (last, last)):
        result = engine.generate(TEXT, max_new_tokens=40, stop_tokens=stop_tokens, **SAMPLED)
        assert result.tokens == free[: free.index(last) + 1]
        assert result.finish_reason == "stop_token"
        assert result.text == engine.decode(result.tokens[:-1])


def test_end_of_text(engine):
    """Token 0 ends a text unless it is ignored; it is special, so the text is without it."""
    options = {"temperature": 3.0, "max_new_tokens": 250}
    seed = next(s for s in range(1000) if 0 in engine.generate([1], seed=s, **options).tokens)
    ended = engine.generate([1], seed=seed, **options)
    assert (ended.finish_reason, ended.tokens.index(0)) == ("stop_token", len(ended.tokens) - 1)
    ignored = engine.generate([1], seed=seed, ignore_eos=True, **options)
    assert ignored.tokens[: len(ended.tokens)] == ended.tokens
    assert len(ignored.tokens) == 250
    assert "<|endoftext|>" not in ignored.text
    shown = engine.generate([1], seed=seed, ignore_eos=True, skip_special_tokens=False, **options)
    assert shown.text == engine.decode(ignored.tokens, skip_special_tokens=False)
    assert "<|endoftext|>" in shown.text


def test_limits(engine):
    none = engine.generate(TEXT, max_new_tokens=0)
    assert (none.text, none.tokens, none.finish_reason) == ("", [], "token_limit")
    assert [astuple(e) for e in engine.stream(TEXT, max_new_tokens=0)] == [
        (0, "", None, None, "token_limit")
    ]
    full = engine.generate([1] * 290, max_new_tokens=11, ignore_eos=True)
    assert (len(full.tokens), full.finish_reason) == (10, "context_limit")
    assert len(engine.generate([1], ignore_eos=True).tokens) == 128


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_logprobs(engine, count):
    """The chosen token's and the likeliest ones', under the model before any filter."""
    result = engine.generate(TEXT, max_new_tokens=20, logprobs=count, **SAMPLED)
    logits = engine.logits(result.prompt_tokens + result.tokens)[len(result.prompt_tokens) - 1 : -1]
    exact = log_softmax(logits.astype(np.float64))
    assert [step.token for step in result.logprobs] == result.tokens
    for step, row in zip(result.logprobs, exact, strict=True):
        assert step.logprob == pytest.approx(row[step.token], abs=1e-5)
        order = np.argsort(-row, kind="stable")[:count]
        assert list(step.top) == order.tolist()
        np.testing.assert_allclose(list(step.top.values()), row[order], atol=1e-5)


def test_unknown_option(engine):
    with pytest.raises(TypeError, match="unknown option 'temprature': did you mean 'temperature'"):
        engine.generate(TEXT, temprature=1.0)
    with pytest.raises(
        TypeError, match=r"unknown option 'xyz': expected one of \['max_new_tokens'"
    ):
        engine.stream(TEXT, xyz=1)


# Logits, score, perplexity.


def test_logits(engine, oracle):
    tokens = engine.encode(TEXT)
    logits = engine.logits(TEXT)
    assert (logits.dtype, logits.shape) == (np.float32, (len(tokens), VOCAB))
    assert relative_error(logits, oracle.logits(tokens)) < 1e-6
    np.testing.assert_array_equal(engine.logits(tokens), logits)


def test_logits_into_an_array(engine):
    expected = engine.logits([1, 2, 3])
    out = np.full((3, VOCAB), np.nan, np.float32)
    assert engine.logits([1, 2, 3], out=out) is out
    np.testing.assert_array_equal(out, expected)
    whole = np.full((5, VOCAB), 7, np.float32)
    engine.logits([1, 2, 3], out=whole[1:4])
    np.testing.assert_array_equal(whole[1:4], expected)
    assert (whole[[0, 4]] == 7).all()
    tensor = tvm_ffi.from_dlpack(np.zeros((3, VOCAB), np.float32))
    engine.logits([1, 2, 3], out=tensor)
    np.testing.assert_array_equal(np.from_dlpack(tensor), expected)


def test_logits_into_a_torch_tensor(engine):
    torch = pytest.importorskip("torch")
    out = torch.zeros((3, VOCAB))
    assert engine.logits(torch.tensor([1, 2, 3]), out=out) is out
    np.testing.assert_array_equal(out.numpy(), engine.logits([1, 2, 3]))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros((2, VOCAB)), TypeError, "out: expected dtype float32"),
        (np.zeros((2, VOCAB), np.int32), TypeError, "out: expected dtype float32"),
        (np.zeros((3, VOCAB), np.float32), ValueError, r"\[2, 400\].*found \[3, 400\]"),
        (np.zeros(2 * VOCAB, np.float32), ValueError, r"\[2, 400\].*found \[800\]"),
        (np.zeros((VOCAB, 2), np.float32).T, ValueError, "out: expected a contiguous"),
        (np.zeros((2, 2 * VOCAB), np.float32)[:, ::2], ValueError, "out: expected a contiguous"),
        (read_only(np.zeros((2, VOCAB), np.float32)), ValueError, "out: .* read-only"),
        ([[0.0] * VOCAB] * 2, TypeError, "out: expected a DLPack array, found list"),
    ],
)
def test_logits_into_a_wrong_array(engine, out, error, message):
    with pytest.raises(error, match=message):
        engine.logits([1, 2], out=out)


def test_score(engine):
    tokens = engine.encode(TEXT)
    score = engine.score(TEXT)
    expected = log_softmax(engine.logits(tokens).astype(np.float64))
    expected = expected[np.arange(len(tokens) - 1), tokens[1:]]
    assert score.tokens == tokens
    assert score.logprobs.dtype == np.float32
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert score.total == pytest.approx(expected.sum(), rel=1e-6)
    assert engine.score(tokens).total == score.total


def test_score_of_several(engine):
    texts = [TEXT, engine.encode("Good morning"), np.array([5, 6])]
    scores = engine.score(texts)
    for score, text in zip(scores, texts, strict=True):
        alone = engine.score(text)
        assert score.tokens == alone.tokens
        np.testing.assert_array_equal(score.logprobs, alone.logprobs)
        assert score.total == alone.total
    # The last token is never fed.
    assert len(engine.score([5] * (LONGEST + 1)).logprobs) == LONGEST
    with pytest.raises(ValueError, match=f"{LONGEST + 2} tokens"):
        engine.score([5] * (LONGEST + 2))
    with pytest.raises(ValueError, match=r"prompt\[1\]: a score needs at least 2 tokens"):
        engine.score([[1, 2], [1]])
    with pytest.raises(TypeError, match=r"prompt\[1\]: expected"):
        engine.score([[1, 2], 3])


@pytest.mark.parametrize("top", [0, 1, 3, 100])
def test_loglikelihood(engine, top):
    """As the logits say of the whole text; pairs of one token and of more than a piece."""
    rng = np.random.default_rng(1)
    lengths = [(1, 1), (1, LONGEST), (LONGEST, 1), (3, 5), (70, 64), (63, 65), (20, 130)]
    pairs = [(rng.integers(0, VOCAB, c).tolist(), rng.integers(0, VOCAB, n)) for c, n in lengths]
    results = engine.loglikelihood([c for c, _ in pairs], [n for _, n in pairs], top=top)
    for (context, continuation), result in zip(pairs, results, strict=True):
        whole = context + continuation.tolist()
        logits = engine.logits(whole[:-1]).astype(np.float64)[len(context) - 1 :]
        exact = log_softmax(logits)
        assert result.tokens == continuation.tolist()
        assert result.logprobs.dtype == np.float32
        places = np.arange(len(continuation))
        np.testing.assert_allclose(result.logprobs, exact[places, continuation], atol=1e-5)
        assert result.total == pytest.approx(exact[places, continuation].sum(), rel=1e-6)
        assert result.is_greedy == (logits.argmax(-1) == continuation).all()
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :top]
        assert [list(found) for found in result.top] == order.tolist()
        for place, found in enumerate(result.top):
            np.testing.assert_allclose(list(found.values()), exact[place, order[place]], atol=1e-5)


def test_loglikelihood_is_greedy(engine):
    text = engine.generate(TEXT, max_new_tokens=100, ignore_eos=True).tokens
    other = [*text[:-1], (text[-1] + 1) % VOCAB]
    prompt = engine.encode(TEXT)
    yes, no = engine.loglikelihood([prompt, prompt], [text, other])
    assert yes.is_greedy is True and no.is_greedy is False


def test_loglikelihood_of_texts(engine):
    """Divided as in lm-evaluation-harness (lm_eval.api.model.TemplateLM._encode_pair)."""
    pairs = [
        ("It was", " the best"),
        ("It was ", "the best"),
        ("It was \n\t\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\x1f", "of times"),
        (b"It was", b" of"),
    ]
    results = engine.loglikelihood([c for c, _ in pairs], [n for _, n in pairs])
    for (context, continuation), result in zip(pairs, results, strict=True):
        if isinstance(context, bytes):
            context, continuation = context.decode(), continuation.decode()
        head = engine.encode(context.rstrip())
        tail = engine.encode(context + continuation)[len(head) :]
        assert result.tokens == tail
        assert result.total == engine.loglikelihood([head], [tail])[0].total


def test_loglikelihood_after_an_empty_context(engine):
    first = engine.config.bos_token
    if first is None:
        first = engine.config.eos_tokens[0]
    tokens = engine.encode(TEXT, add_special_tokens=False)
    (result,) = engine.loglikelihood([""], [TEXT])
    (expected,) = engine.loglikelihood([[first]], [tokens])
    assert (result.tokens, result.total) == (tokens, expected.total)


def test_loglikelihood_reports_progress(engine):
    seen = []
    engine.loglikelihood([[1]] * 3, [[2]] * 3, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class EnoughError(Exception):
        pass

    def stop(done, total):
        raise EnoughError

    with pytest.raises(EnoughError):
        engine.loglikelihood([[1]] * 3, [[2]] * 3, progress=stop)
    assert engine.loglikelihood([], []) == []


@pytest.mark.parametrize(
    ("contexts", "continuations", "options", "error", "message"),
    [
        ("It", ["a"], {}, TypeError, "contexts: expected a list of texts .*, found str"),
        ([1, 2], [[1]], {}, TypeError, "contexts: .* of single token ids"),
        (["It"], "a", {}, TypeError, "continuations: expected a list"),
        (["It"], [], {}, ValueError, "one for each of 1 contexts, found 0"),
        (["It"], [[1]], {}, TypeError, r"continuations\[0\]: expected text .*, found list"),
        ([[1]], ["a"], {}, TypeError, r"continuations\[0\]: expected token ids .*, found str"),
        (["It", "It"], [" a", ""], {}, ValueError, r"contexts\[1\]: the continuation has no"),
        (["It", " "], [" a", "b"], {}, ValueError, r"contexts\[1\]: the context has no token"),
        ([[1], []], [[1], [1]], {}, ValueError, r"contexts\[1\]: the context has no tokens"),
        ([[1]], [[]], {}, ValueError, r"contexts\[0\]: the continuation has no tokens"),
        ([[1]], [[VOCAB]], {}, IndexError, r"continuations\[0\]\[0\] is 400"),
        ([[1] * 200], [[1] * 102], {}, ValueError, "302 tokens.* at most 301"),
        ([[1]], [[1]], {"top": 101}, ValueError, r"top: expected an integer in \[0, 100\]"),
        ([[1]], [[1]], {"top": True}, TypeError, "top: expected an integer, found bool"),
        ([[1]], [[1]], {"progress": 1}, TypeError, "progress: expected a callable"),
    ],
)
def test_loglikelihood_of_wrong_arguments(engine, contexts, continuations, options, error, message):
    with pytest.raises(error, match=message):
        engine.loglikelihood(contexts, continuations, **options)


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_prompt_logprobs(engine, new_tokens):
    tokens = engine.encode(TEXT * 8)
    assert len(tokens) > 64  # more than one piece
    options = {"max_new_tokens": new_tokens, "ignore_eos": True}
    plain = engine.generate(tokens, **options)
    assert plain.prompt_logprobs is None
    exact = log_softmax(engine.logits(tokens).astype(np.float64))
    for count in (0, 3):
        result = engine.generate(tokens, prompt_logprobs=count, **options)
        assert (result.tokens, result.text) == (plain.tokens, plain.text)
        assert result.finish_reason == plain.finish_reason
        assert result.logprobs is None
        first, *rest = result.prompt_logprobs
        assert first is None
        assert [one.token for one in rest] == tokens[1:]
        order = np.argsort(-exact, axis=-1, kind="stable")[:, :count]
        for place, one in enumerate(rest):
            assert one.logprob == pytest.approx(exact[place, one.token], abs=1e-5)
            assert list(one.top) == order[place].tolist()
    both = engine.generate([tokens, [1]], prompt_logprobs=0, logprobs=1, **options)
    assert [len(one.prompt_logprobs) for one in both] == [len(tokens), 1]
    assert [len(one.logprobs) for one in both] == [new_tokens, new_tokens]
    with pytest.raises(ValueError, match=r"prompt_logprobs: expected an integer in \[0, 100\]"):
        engine.generate(tokens, prompt_logprobs=101)


def test_perplexity(engine):
    """Of one window it is the score's; tests/python/test_family.py has the windows' proof."""
    text = TEXT * 3
    score = engine.score(text)
    result = engine.perplexity(text, context=LONGEST, stride=LONGEST)
    nll = -score.total
    assert result.mean_nll == pytest.approx(nll / len(score.logprobs), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.mean_nll))
    scored = engine.decode(score.tokens[1:])
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / len(scored.encode()), rel=1e-6)
    assert (result.scored_tokens, result.total_tokens) == (len(score.logprobs), len(score.tokens))
    assert result.seconds > 0
    assert engine.perplexity(score.tokens).bits_per_byte == 0
    assert engine.perplexity(text.encode()).bits_per_byte > 0


# Arrays.


class DLPackOnly:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnGpu(DLPackOnly):
    def __dlpack__(self, **options):
        raise BufferError("this array lies on a GPU")

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize(
    "tokens",
    [
        (5, 6, 7),
        range(5, 8),
        [np.int64(5), np.uint8(6), 7],
        np.array([5, 6, 7], np.int32),
        np.array([5, 6, 7], np.int64),
        np.array([5, 6, 7], np.uint8),
        np.array([5, 6, 7], ">i4"),
        np.array([5, 0, 6, 0, 7])[::2],
        np.array([7, 6, 5])[::-1],
        read_only(np.array([5, 6, 7])),
        DLPackOnly(np.array([5, 6, 7], np.int32)),
        tvm_ffi.from_dlpack(np.array([5, 6, 7])),
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', '')}",
)
def test_token_arrays(engine, tokens):
    expected = engine.generate([5, 6, 7], max_new_tokens=5)
    result = engine.generate(tokens, max_new_tokens=5)
    assert without_times(result) == without_times(expected)
    np.testing.assert_array_equal(engine.logits(tokens), engine.logits([5, 6, 7]))
    assert engine.decode(tokens) == engine.decode([5, 6, 7])
    (batched,) = engine.generate([tokens], max_new_tokens=5)
    assert batched.tokens == expected.tokens


def test_torch_tokens(engine):
    torch = pytest.importorskip("torch")
    expected = engine.generate([5, 6, 7], max_new_tokens=5).tokens
    for dtype in (torch.int32, torch.int64, torch.uint8):
        tokens = torch.tensor([5, 6, 7], dtype=dtype)
        assert engine.generate(tokens, max_new_tokens=5).tokens == expected
    assert engine.generate(torch.tensor([[5, 6, 7]])[0], max_new_tokens=5).tokens == expected


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.array([1.0]), TypeError, "prompt: expected integers, found dtype float64"),
        (np.array([True]), TypeError, "prompt: expected integers, found dtype bool"),
        (np.array([[1, 2]]), ValueError, r"prompt: expected a vector.*\(1, 2\); pass prompt\[0\]"),
        (np.array(3), ValueError, r"prompt: expected a vector.*\(\)"),
        (np.array([1, 2**31]), IndexError, "found 2147483648 at index 1"),
        (np.array([2**64 - 1], np.uint64), IndexError, f"found {2**64 - 1} at index 0"),
        ([1, 2**100], IndexError, f"found {2**100} at index 1"),
        ([1, True], TypeError, "prompt: expected integers, found bool at index 1"),
        ([1, None], TypeError, "prompt: expected integers, found NoneType at index 1"),
        (
            OnGpu(np.array([1])),
            TypeError,
            "prompt: expected an integer array in host memory.*OnGpu",
        ),
        (["a", 3], TypeError, r"prompt\[1\]: expected str, bytes, .* found int"),
        (["a", np.array([1.5])], TypeError, r"prompt\[1\]: expected integers, found dtype float64"),
    ],
)
def test_wrong_tokens(engine, tokens, error, message):
    with pytest.raises(error, match=message):
        engine.generate(tokens)


# Errors. tests/python/test_bad_input.py has the messages.


def break_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_exceptions(tmp_path):
    """Each kind of error arrives as its Python exception, with the message and nothing else."""

    def write(**options) -> Path:
        return write_random_checkpoint(tmp_path / "checkpoint", **options)

    def open_with(**changes: object) -> None:
        break_config(write(), **changes)
        Engine(tmp_path / "checkpoint")

    def open_folder_as_file() -> None:
        folder = write()
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        Engine(folder)

    missing = tmp_path / "missing"
    cases = [
        (ValueError, "hidden_size", lambda: open_with(hidden_size=-3)),
        (IndexError, "400", lambda: Engine(write()).logits([1, 400])),
        (FileNotFoundError, str(missing), lambda: Engine(missing)),
        (FileNotFoundError, str(missing), lambda: Tokenizer(missing)),
        (NotImplementedError, "mixtral", lambda: open_with(model_type="mixtral")),
        (ValueError, "temperature", lambda: Engine(write()).generate([1], temperature=-1)),
    ]
    for kind, word, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind
        assert word in str(caught.value)
        assert caught.value.args == (str(caught.value),)
        assert_no_native_frames(caught.value)
    with pytest.raises(OSError, match=r"config\.json"):
        open_folder_as_file()


def assert_no_native_frames(error: BaseException) -> None:
    """The traceback shows Python alone: no C++ file, no address."""
    frame = error.__traceback__
    while frame is not None:
        assert not frame.tb_frame.f_code.co_filename.endswith((".cpp", ".hpp", ".h", ".so"))
        frame = frame.tb_next


def test_every_kind_of_error_is_a_python_exception():
    """apache-tvm-ffi would turn a kind that it does not know into RuntimeError."""
    source = (Path(__file__).parents[2] / "src/base/error.cpp").read_text()
    names = {line.split('"')[1] for line in source.splitlines() if 'return "' in line}
    assert "FileNotFoundError" in names
    for name in names:
        raised = tvm_ffi.core.Error(name, "the message", "").py_error()
        assert type(raised).__name__ == name
        assert str(raised) == "the message"


def test_no_tokenizer(tmp_path):
    engine = Engine(write_random_checkpoint(tmp_path))
    assert not engine.info.has_tokenizer
    result = engine.generate([1, 2], max_new_tokens=3, ignore_eos=True)
    assert (len(result.tokens), result.text) == (3, "")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        engine.encode("text")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        engine.generate("text")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "path: expected str or os.PathLike, found int"),
        ((b"models",), {}, "path: expected str or os.PathLike, found bytes"),
        (("models", 3), {}, "device: expected str, found int"),
        (("models",), {"threads": "all"}, "threads: expected an integer, found str"),
        (("models",), {"context": 1.5}, "context: expected an integer, found float"),
        (("models",), {"kv_dtype": np.float16}, "kv_dtype: expected str, found type"),
        (("models",), {"mode": None}, "mode: expected str, found NoneType"),
    ],
)
def test_wrong_types(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        Engine(*arguments, **options)


# What surrounds the calls.


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda text: memoryview(bytearray(text))])
def test_bytes_are_text_everywhere(engine, kind):
    data = TEXT.encode()
    expected = engine.generate(TEXT, max_new_tokens=5)
    assert engine.generate(kind(data), max_new_tokens=5).tokens == expected.tokens
    (batched,) = engine.generate([kind(data)], max_new_tokens=5)
    assert batched.prompt_tokens == expected.prompt_tokens
    assert engine.encode(kind(data)) == expected.prompt_tokens
    assert engine.tokenizer.encode_batch([kind(data)]) == [expected.prompt_tokens]
    assert engine.score(kind(data)).total == engine.score(TEXT).total
    assert engine.perplexity(kind(data)).bits_per_byte == engine.perplexity(TEXT).bits_per_byte
    stop = kind(expected.text.encode())
    for stops in (stop, [stop]):
        assert engine.generate(TEXT, max_new_tokens=9, stop=stops).finish_reason == "stop_string"


def test_memoryview_of_numbers_is_no_text(engine):
    ids = memoryview(np.array([5, 6, 7], np.int32))
    with pytest.raises(TypeError, match=r"prompt: .*memoryview of elements of 4 bytes.*token ids"):
        engine.generate(ids)


def test_no_prompts_give_no_texts(engine):
    assert engine.generate([]) == engine.generate(()) == []
    assert list(engine.stream([])) == []


def test_errors_name_the_prompt_and_the_callers_options(engine):
    cases = [
        (lambda: engine.generate(["a", ""]), ValueError, r"prompt\[1\]: the prompt has no tokens"),
        (lambda: engine.generate([[1], [2, 400]]), IndexError, r"prompt\[1\]\[1\] is 400"),
        (lambda: engine.generate([1, 400]), IndexError, r"prompt\[1\] is 400"),
        (lambda: engine.generate("a", stop=""), ValueError, r"stop\[0\] is empty"),
        (lambda: Engine(engine.info.path, context=LONGEST + 1), ValueError, "context must be in"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_what_cannot_be_pickled_says_so(engine):
    stream = engine.stream([1], max_new_tokens=2)
    for value in (engine, engine.tokenizer, stream):
        for refuse in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"cannot be pickled or copied.*in each process"):
                refuse(value)


def test_closed_engine(folder):
    with Engine(folder) as engine:
        stream = engine.stream([3], max_new_tokens=4, ignore_eos=True)
        tokenizer = engine.tokenizer
        expected = engine.generate([3], max_new_tokens=4, ignore_eos=True).tokens
    engine.close()
    assert repr(engine) == "Engine(closed)"
    calls = [
        lambda: engine.generate([1]),
        lambda: engine.encode("a"),
        lambda: engine.score([1, 2]),
        lambda: engine.measure_read_ceiling(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="this Engine is closed"):
            call()
    assert [event.token for event in stream] == expected, "a stream goes on"
    assert tokenizer.encode(TEXT)


# Threads, cancellation, lifetime.


def test_gil_is_released(engine):
    """While a thread computes, this one runs, though the interpreter never makes them switch."""
    tokens = [1] * LONGEST

    def calls_seen_here() -> set[int]:
        calls: list[None] = []
        worker = threading.Thread(
            target=lambda: [(engine.logits(tokens), calls.append(None)) for _ in range(20)]
        )
        seen = set()
        worker.start()
        while worker.is_alive():
            seen.add(len(calls))
            time.sleep(0)
        return seen - {0, 20}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        # On a busy machine this thread may have got no core while the other one worked.
        assert any(calls_seen_here() for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def test_every_function_releases_the_gil():
    functions = [f for f in vars(_native).values() if isinstance(f, _native.NativeFunction)]
    assert len(functions) > 15
    assert all(function.function.release_gil for function in functions)


def test_many_python_threads(engine):
    prompts = [[1 + i] * (1 + 7 * i) for i in range(12)]

    def work(prompt: list[int]) -> tuple:
        result = engine.generate(prompt, max_new_tokens=20, **SAMPLED)
        return result.text, result.tokens, engine.score(prompt + result.tokens).total

    expected = [work(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, prompts)) == expected


def test_threads_share_a_stream(engine):
    """Each event goes to one of them."""
    expected = engine.generate(TEXT, max_new_tokens=100, **SAMPLED).tokens
    stream = engine.stream(TEXT, max_new_tokens=100, **SAMPLED)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: [event.token for event in stream], range(4)))
    assert sorted(token for part in parts for token in part) == sorted(expected)
    assert stream.results[0].tokens == expected


def assert_cancelled(result: clusterfusion.Generation, expected: clusterfusion.Generation) -> None:
    assert result.finish_reason == "cancelled"
    assert 0 < len(result.tokens) < len(expected.tokens)
    assert result.tokens == expected.tokens[: len(result.tokens)]


def test_close(engine):
    expected = engine.generate([3], max_new_tokens=200, ignore_eos=True)
    stream = engine.stream([3], max_new_tokens=200, ignore_eos=True)
    first = [next(stream) for _ in range(5)]
    stream.close()
    assert next(stream, None) is None
    assert_cancelled(stream.results[0], expected)
    assert stream.results[0].text.startswith("".join(event.text for event in first))
    stream.close()

    with engine.stream([3], max_new_tokens=200, ignore_eos=True) as stream:
        for event in stream:
            if event.token == expected.tokens[7]:
                break
    assert_cancelled(stream.results[0], expected)

    with (
        pytest.raises(ZeroDivisionError),
        engine.stream([3], max_new_tokens=200, ignore_eos=True) as stream,
    ):
        print(1 / (next(stream).index))
    assert_cancelled(stream.results[0], expected)
    assert engine.generate([3], max_new_tokens=200, ignore_eos=True).tokens == expected.tokens


def test_cancel_from_another_thread(long_engine):
    stream = long_engine.stream([3], max_new_tokens=150_000, ignore_eos=True)
    events: list[Event] = []
    reader = threading.Thread(target=lambda: events.extend(stream))
    reader.start()
    while not stream.results[0].tokens:
        time.sleep(0.001)
    stream.cancel()
    reader.join()
    assert events[-1].finish_reason == stream.results[0].finish_reason == "cancelled"
    assert len(stream.results[0].tokens) < 150_000


def interrupted_after(seconds: float):
    """Lets SIGALRM stand for Ctrl-C."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.fixture
def alarm():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_keyboard_interrupt(long_engine, alarm):
    tokens = [i % 300 for i in range(150_000)]
    calls = [
        lambda: long_engine.generate([3], max_new_tokens=150_000, ignore_eos=True),
        lambda: list(long_engine.stream([3], max_new_tokens=150_000, ignore_eos=True)),
        lambda: long_engine.perplexity(tokens, context=100, stride=2),
        lambda: long_engine.perplexity(tokens),
        lambda: long_engine.score(tokens),
        lambda: long_engine.score([tokens, tokens]),
        lambda: long_engine.loglikelihood([[3]], [tokens]),
        lambda: long_engine.loglikelihood([[3]] * 100_000, [[4]] * 100_000),
        lambda: long_engine.generate(tokens, max_new_tokens=1),
        lambda: long_engine.generate(tokens, max_new_tokens=0, prompt_logprobs=0),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            interrupted_after(0.05)
            call()
        assert len(long_engine.generate([3], max_new_tokens=5, ignore_eos=True).tokens) == 5


def test_finish_reasons_of_texts_that_did_not_end(long_engine, alarm):
    stream = long_engine.stream([[3], [4]], max_new_tokens=150_000, ignore_eos=True)
    for _ in range(4):
        next(stream)
    assert [result.finish_reason for result in stream.results] == [None, None]
    stream.close()
    assert [result.finish_reason for result in stream.results] == ["cancelled"] * 2

    prompt = [i % 300 for i in range(150_000)]
    stream = long_engine.stream([[3], prompt], max_new_tokens=9, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted_after(0.05)
        list(stream)
    assert [result.finish_reason for result in stream.results] == ["cancelled"] * 2
    assert next(stream, None) is None


def test_parts_keep_the_engine_alive(folder):
    expected = Engine(folder).generate(TEXT, max_new_tokens=20).tokens
    stream = Engine(folder).stream(TEXT, max_new_tokens=20)
    tokenizer = Engine(folder).tokenizer
    gc.collect()
    assert [event.token for event in stream] == expected
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_dropped_streams_free_their_memory(folder):
    """Each holds the KV pages of 300 positions; 400 of them would need 130 MB."""
    engine = Engine(folder)

    def use(count: int) -> int:
        for _ in range(count):
            next(engine.stream([1] * 20, max_new_tokens=200, ignore_eos=True))
        return resident_bytes()

    before = use(20)
    assert use(400) - before < 50e6


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_events_are_well_formed(engine):
    """Random tokens make broken characters all the time; no piece of text shows one half."""
    for seed in range(5):
        stream = engine.stream([1], max_new_tokens=200, **{**SAMPLED, "seed": seed})
        text = "".join(event.text for event in stream)
        assert text == stream.results[0].text == engine.decode(stream.results[0].tokens)
        assert text.encode().decode() == text


def test_statistics_add_up(engine):
    stream = engine.stream([1], max_new_tokens=30, ignore_eos=True)
    counts = [stream.results[0].statistics.new_tokens for _ in stream]
    assert counts == sorted(counts)
    assert counts[-1] == 30
    assert all(after - before <= 1 for before, after in pairwise(counts))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_is_told_that_its_engine_stayed_behind(demo_model, threads):
    """The thread that generates is not in a forked process: an error, and no wait for ever."""
    script = f"""
import os
import clusterfusion
engine = clusterfusion.Engine({str(demo_model)!r}, threads={threads})
if os.fork() == 0:
    try:
        engine.generate("hello", max_new_tokens=3)
    except NotImplementedError as error:
        print(error, flush=True)
    del engine
    own = clusterfusion.Engine({str(demo_model)!r}, threads={threads})
    print(len(own.generate("hello", max_new_tokens=3).tokens), flush=True)
    os._exit(0)
print(os.wait()[1], len(engine.generate("hello", max_new_tokens=3).tokens))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told, *rest = done.stdout.splitlines()
    assert "is a fork" in told and "make an engine in each process" in told
    assert rest == ["3", "0 3"]


@pytest.mark.parametrize(
    "options",
    [{"device": "\udcff"}, {"kv_dtype": "\udcff"}, {"mode": "\udcff"}, {"draft": "\udcff"}],
)
def test_options_that_are_no_utf8(demo_model, options):
    [name] = options
    with pytest.raises(ValueError, match=rf"{name}: expected .*lone surrogate|path: .*surrogate"):
        Engine(demo_model, **options)


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    for open_it in (Engine, Tokenizer):
        with pytest.raises(ValueError, match="path: expected a path in UTF-8, found a lone surrog"):
            open_it(folder)
