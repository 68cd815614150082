"""What adjusts and forbids tokens, against the same rules in NumPy on the model's own logits."""

import json
import os
import subprocess

import numpy as np
import pytest
from checkpoints import train_tokenizer, write_random_checkpoint
from clusterfusion import Engine

PROGRAM = os.environ.get("CLUSTERFUSION_BIN")
VOCAB, KNOWN = 400, 320
PROMPT = [5, 6, 7, 5, 6]
COUNT = 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    """Its vocabulary is padded: the tokenizer knows the first KNOWN ids."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("padded"), vocab_size=VOCAB, seed=3)
    train_tokenizer(folder, KNOWN)
    return Engine(folder, device="cpu")


def expected_tokens(engine: Engine, adjust, count: int = COUNT) -> list[int]:
    """Greedy tokens from logits that adjust(logits, tokens) has changed; no tie among them."""
    tokens = list(PROMPT)
    for _ in range(count):
        logits = engine.logits(tokens)[-1].astype(np.float64)
        adjust(logits, tokens)
        second, first = np.sort(logits)[-2:]
        assert first - second > 1e-5, "a tie: choose another seed"
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


def pad(logits: np.ndarray) -> None:
    logits[KNOWN:] = -np.inf


def generate(engine: Engine, **options) -> list[int]:
    return engine.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True, **options).tokens


def test_padded_ids_are_never_drawn_unless_allowed(engine):
    assert generate(engine) == expected_tokens(engine, lambda logits, _: pad(logits))
    options = {"temperature": 5.0, "max_new_tokens": 20, "ignore_eos": True}
    texts = [engine.generate(PROMPT, seed=seed, **options).tokens for seed in range(50)]
    assert max(map(max, texts)) < KNOWN
    options["allow_padded_ids"] = True
    texts = [engine.generate(PROMPT, seed=seed, **options).tokens for seed in range(50)]
    assert max(map(max, texts)) >= KNOWN


def test_frequency_and_presence_penalty(engine):
    """As in OpenAI's API reference: mu[j] -= c[j] frequency + (c[j] > 0) presence."""

    def adjust(logits: np.ndarray, tokens: list[int]) -> None:
        counts = np.bincount(tokens[len(PROMPT) :], minlength=VOCAB)
        logits -= counts * 0.3 + (counts > 0) * 0.7
        pad(logits)

    found = generate(engine, frequency_penalty=0.3, presence_penalty=0.7)
    assert found == expected_tokens(engine, adjust)
    assert found != generate(engine)


def test_logit_bias(engine):
    usual = generate(engine)
    bias = {usual[0]: -100, 17: 1.5}

    def adjust(logits: np.ndarray, tokens: list[int]) -> None:
        for token, value in bias.items():
            logits[token] += value
        pad(logits)

    found = generate(engine, logit_bias=bias)
    assert found == expected_tokens(engine, adjust)
    assert usual[0] not in found
    assert generate(engine, logit_bias={9: 100}) == [9] * COUNT


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngrams(engine, size):
    def adjust(logits: np.ndarray, tokens: list[int]) -> None:
        grams = [tokens[at : at + size] for at in range(len(tokens) - size + 1)]
        for token in range(VOCAB):
            if [*tokens[len(tokens) - size + 1 :], token] in grams:
                logits[token] = -np.inf
        pad(logits)

    found = generate(engine, no_repeat_ngram_size=size)
    assert found == expected_tokens(engine, adjust)
    whole = PROMPT + found
    grams = [tuple(whole[at : at + size]) for at in range(len(whole) - size + 1)]
    new = grams[len(PROMPT) - size + 1 :]
    assert len(set(new)) == len(new)


def test_min_new_tokens(engine):
    usual = generate(engine)
    stops = [usual[2], usual[5], 0]
    short = engine.generate(PROMPT, max_new_tokens=COUNT, stop_tokens=stops)
    assert (len(short.tokens), short.finish_reason) == (usual.index(stops[0]) + 1, "stop_token")

    def adjust(logits: np.ndarray, tokens: list[int]) -> None:
        if len(tokens) - len(PROMPT) < 8:
            logits[stops] = -np.inf
        pad(logits)

    options = {"max_new_tokens": COUNT, "min_new_tokens": 8, "stop_tokens": stops}
    longer = engine.generate(PROMPT, **options)
    assert len(longer.tokens) > 8
    assert longer.tokens[:8] == expected_tokens(engine, adjust, 8)


def test_batches_and_seeds_change_nothing(engine):
    options = {"temperature": 1.2, "top_k": 50, "frequency_penalty": 0.5, "logit_bias": {3: 2}}
    options |= {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "max_new_tokens": 20}
    prompts = [PROMPT, [1], [2] * 30]
    alone = [engine.generate(prompt, seed=7, **options).tokens for prompt in prompts]
    assert [result.tokens for result in engine.generate(prompts, seed=7, **options)] == alone


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frequency_penalty": 2.5}, ValueError, r"frequency_penalty must be in \[-2, 2\].*2.5"),
        ({"presence_penalty": -3}, ValueError, r"presence_penalty must be in \[-2, 2\].*-3"),
        ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size must be >= 0.*-1"),
        ({"logit_bias": {1: 101}}, ValueError, r"logit_bias of token 1 must be in \[-100, 100\]"),
        ({"logit_bias": {VOCAB: 1}}, IndexError, r"logit_bias\[0\] is 400"),
        ({"logit_bias": [1]}, TypeError, "logit_bias: expected a dict"),
        ({"logit_bias": {"a": 1}}, TypeError, "logit_bias: expected integers, found str"),
        ({"logit_bias": {1: "x"}}, TypeError, r"logit_bias\[1\]: expected a number"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            ValueError,
            r"min_new_tokens must be in \[0, 8",
        ),
        ({"allow_padded_ids": 1}, TypeError, "allow_padded_ids: expected bool"),
    ],
)
def test_impossible_options(engine, options, error, message):
    with pytest.raises(error, match=message):
        engine.generate(PROMPT, **options)


def test_every_token_forbidden(tmp_path):
    engine = Engine(write_random_checkpoint(tmp_path, vocab_size=3), device="cpu")
    with pytest.raises(ValueError, match="no token is left to choose at position 3"):
        engine.generate([0], max_new_tokens=9, no_repeat_ngram_size=1, ignore_eos=True)


@pytest.mark.skipif(PROGRAM is None, reason="CLUSTERFUSION_BIN is not set")
def test_program(engine):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [PROGRAM, "generate", engine.info.path, "--prompt-tokens", "5,6,7,5,6"]
        command += ["-n", COUNT, "--ignore-eos", "--json", "-q", *arguments]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    options = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "no_repeat_ngram_size": 2}
    arguments = ["--frequency-penalty", 0.5, "--presence-penalty", 0.25]
    arguments += ["--no-repeat-ngram-size", 2, "--logit-bias", "3=2.5, 17=-100"]
    arguments += ["--min-new-tokens", 3]
    document = json.loads(run(*arguments).stdout)
    expected = generate(engine, **options, logit_bias={3: 2.5, 17: -100}, min_new_tokens=3)
    assert document["tokens"] == expected
    sampled = ["--temperature", 5, "--seed", 4, "--allow-padded-ids"]
    expected = generate(engine, temperature=5, seed=4, allow_padded_ids=True)
    assert json.loads(run(*sampled).stdout)["tokens"] == expected
    for bias, message in (("3", 'entry 0 is "3"'), ("3=1,x=2", 'entry 1 is "x=2"')):
        ended = run("--logit-bias", bias)
        assert ended.returncode == 2 and f"--logit-bias: {message}" in ended.stderr
