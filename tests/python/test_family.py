"""The engine against the float64 oracle, over the whole GPT-NeoX family and many random shapes.

Errors are L2 norms of the difference over L2 norms of the oracle's logits. Where torch and
transformers are installed, the same checkpoints also run there, live.
"""

import random

import clusterfusion
import numpy as np
import pytest
from checkpoints import DTYPE_TAGS, write_random_checkpoint
from family_checks import (
    ERROR_BOUND,
    assert_accurate,
    assert_decode_continues_prefill,
    random_tokens,
    transformers_error,
)
from recordings import FamilyRecord, load_family
from reference_model import ACTIVATIONS, ReferenceModel, log_softmax, relative_error

FAMILY = load_family()
NUM_RANDOM_SHAPES = 300


def is_rotated_in_pairs(setting: dict) -> bool:
    head_dim = setting.get("hidden_size", 64) // setting.get("num_heads", 4)
    return int(head_dim * setting.get("rotary_pct", 0.25)) % 2 == 0


def random_setting(seed: int) -> dict:
    """A small checkpoint of any shape, awkward ones preferred."""
    draw = random.Random(seed)
    head_dim = draw.choice([7, 8, 16, 17, 24, 32, 33, 40, 48, 64, 72, 80, 96, 128, 160, 256])
    num_heads = draw.randint(1, max(1, min(7, 256 // head_dim)))
    hidden = head_dim * num_heads
    setting = {
        "hidden_size": hidden,
        "num_layers": draw.randint(1, 4),
        "num_heads": num_heads,
        "intermediate_size": draw.choice([4 * hidden, draw.randint(1, 4 * hidden)]),
        "vocab_size": draw.choice([5, 255, 256, draw.randint(3, 900)]),
        "max_positions": draw.choice([1, 63, 64, 65, 127, 128, 129, draw.randint(2, 200)]),
        "rotary_pct": draw.choice([0.25, 0.25, 0.5, 1.0, 0.0, draw.random()]),
        "rope_theta": draw.choice([10000, 10000, 500000, 37.5]),
        "hidden_act": draw.choice(["gelu", draw.choice(sorted(ACTIVATIONS))]),
        "parallel_residual": draw.random() < 0.5,
        "tied": draw.random() < 0.3,
        "dtype": draw.choice(list(DTYPE_TAGS)),
        "seed": 10_000 + seed,
        "prefix": draw.random() < 0.7,
        "shards": draw.choice([1, 1, 2, 5]),
        "attention_bias": draw.random() < 0.8,
        "config_style": draw.choice(["old", "new"]),
        "with_buffers": draw.random() < 0.2,
        "head_name": draw.choice(["embed_out", "lm_head"]),
        "vector_dtype": draw.choice([None, None, None, *DTYPE_TAGS]),
    }
    if not is_rotated_in_pairs(setting):
        setting["rotary_pct"] = draw.choice([0.0, (head_dim // 2 * 2) / head_dim])
    return setting


@pytest.fixture(params=FAMILY, ids=lambda record: record.name)
def record(request) -> FamilyRecord:
    return request.param


@pytest.fixture
def checkpoint(record, tmp_path):
    return write_random_checkpoint(tmp_path, **record.setting)


def test_logits_of_the_recorded_family(record, checkpoint):
    """No larger an error than transformers' own in the checkpoint's type."""
    if not is_rotated_in_pairs(record.setting):
        with pytest.raises(NotImplementedError, match=r"config\.json.*rotates 5 values.*even"):
            clusterfusion.Engine(checkpoint, device="cpu")
        return
    logits = clusterfusion.Engine(checkpoint, device="cpu").logits(record.tokens)
    exact = ReferenceModel(checkpoint).logits(record.tokens)
    assert relative_error(logits, exact) <= transformers_error(record, record.dtype)
    assert_accurate(logits, exact, ERROR_BOUND)


def test_greedy_tokens_of_the_recorded_family(record, checkpoint):
    if not is_rotated_in_pairs(record.setting):
        pytest.skip("refused: test_logits_of_the_recorded_family")
    result = clusterfusion.Engine(checkpoint, device="cpu").generate(
        record.tokens[:9], max_new_tokens=len(record.greedy), ignore_eos=True
    )
    assert record.margins.min() > 1e-4, "a tie: record another seed"
    assert result.tokens == record.greedy.tolist()


def test_bound_is_no_larger_than_what_transformers_reaches():
    for record in FAMILY:
        assert transformers_error(record, "float32") * 4 > ERROR_BOUND
        if record.dtype != "float32":
            assert transformers_error(record, record.dtype) > ERROR_BOUND * 100


@pytest.mark.parametrize("seed", range(NUM_RANDOM_SHAPES))
def test_random_shape(seed, tmp_path):
    """Accurate at every position; and the same bits for a prefix and for other thread counts."""
    setting = random_setting(seed)
    tokens = random_tokens(setting, seed)
    write_random_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu", threads=1 + seed % 3)
    logits = engine.logits(tokens)
    assert_accurate(logits, ReferenceModel(tmp_path).logits(tokens), ERROR_BOUND)

    count = 1 + seed * 31 % len(tokens)
    np.testing.assert_array_equal(engine.logits(tokens[:count]), logits[:count])
    other = clusterfusion.Engine(tmp_path, device="cpu", threads=1 + (seed + 1) % 3)
    np.testing.assert_array_equal(other.logits(tokens), logits)
    assert_decode_continues_prefill(engine, tokens[:count], setting)


@pytest.mark.parametrize("dtype", DTYPE_TAGS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 511, 512, 513])
def test_page_and_chunk_borders(tmp_path, dtype, length):
    """KV pages end after 64 positions, pieces of a prefill after 512."""
    setting = {"dtype": dtype, "seed": 77, "max_positions": 640, "parallel_residual": False}
    write_random_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu")
    tokens = random_tokens(setting, seed=3, count=530)
    logits = engine.logits(tokens[:length])
    assert_accurate(logits, ReferenceModel(tmp_path).logits(tokens[:length]), ERROR_BOUND)
    np.testing.assert_array_equal(engine.logits(tokens)[:length], logits)
    assert_decode_continues_prefill(engine, tokens[:length], setting)


@pytest.mark.parametrize("dtype", DTYPE_TAGS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batch_equals_its_members(tmp_path, dtype, threads):
    """Bit for bit: tokens, their log-probabilities and those of the ten likeliest."""
    setting = {"dtype": dtype, "seed": 91, "num_layers": 3, "hidden_size": 160, "num_heads": 2}
    write_random_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu", threads=threads)
    prompts = [random_tokens(setting, n, n) for n in (1, 2, 59, 63, 64, 65, 128, 200)]
    options = {"max_new_tokens": 20, "logprobs": 10, "ignore_eos": True}
    for sampling in ({}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}):
        batch = engine.generate(prompts, **options, **sampling)
        assert len(batch) == len(prompts)
        for prompt, member in zip(prompts, batch, strict=True):
            alone = engine.generate(prompt, **options, **sampling)
            assert member.prompt_tokens == alone.prompt_tokens == prompt
            assert member.tokens == alone.tokens
            assert member.logprobs == alone.logprobs
            assert member.finish_reason == alone.finish_reason


@pytest.mark.parametrize("dtype", DTYPE_TAGS)
def test_decode_alone_equals_prefill(tmp_path, dtype):
    """One token as the prompt and 200 decoded against one prefill of all of them."""
    setting = {"dtype": dtype, "seed": 13, "hidden_size": 96, "num_heads": 3}
    write_random_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu")
    decoded = engine.generate([5], max_new_tokens=200, logprobs=1, ignore_eos=True, temperature=1.0)
    assert len(decoded.tokens) == 200
    exact = log_softmax(ReferenceModel(tmp_path).logits([5, *decoded.tokens]))
    score = engine.score([5, *decoded.tokens])
    expected = exact[np.arange(200), decoded.tokens]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
    assert [step.logprob for step in decoded.logprobs] == score.logprobs.tolist()
    likeliest = engine.logits([5, *decoded.tokens])[:-1].argmax(1)
    assert [next(iter(step.top)) for step in decoded.logprobs] == likeliest.tolist()


def test_score_and_perplexity_against_the_oracle(tmp_path):
    setting = {"seed": 29, "max_positions": 64}
    write_random_checkpoint(tmp_path, **setting)
    engine, oracle = clusterfusion.Engine(tmp_path, device="cpu"), ReferenceModel(tmp_path)
    tokens = random_tokens(setting, seed=1, count=151)
    score = engine.score(tokens[:64])
    expected = log_softmax(oracle.logits(tokens[:64]))[np.arange(63), tokens[1:64]]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(score.total, expected.sum(), rtol=1e-6)
    for context, stride in [(64, 32), (64, 64), (50, 7), (2, 2), (33, 33), (9, 4)]:
        result = engine.perplexity(tokens, context=context, stride=stride)
        assert result.scored_tokens == len(tokens) - 1
        mean = mean_nll_of_each_token(oracle, tokens, context, stride)
        np.testing.assert_allclose(result.mean_nll, mean, rtol=1e-6)
        result = engine.perplexity(
            tokens, context=context, stride=stride, method="transformers_docs"
        )
        mean, count = sliding_window_nll(oracle, tokens, context, stride)
        assert result.scored_tokens == count
        assert result.total_tokens == len(tokens)
        np.testing.assert_allclose(result.mean_nll, mean, rtol=1e-6)
        np.testing.assert_allclose(result.perplexity, np.exp(mean), rtol=1e-5)


def mean_nll_of_each_token(
    oracle: ReferenceModel, tokens: list[int], context: int, stride: int
) -> float:
    """Of all tokens but the first, each in the first window that holds it."""
    nll = []
    begin = 0
    while len(nll) < len(tokens) - 1:
        end = min(begin + context, len(tokens))
        first = max(0, min(begin, len(nll)))  # what predicts the first target must be read
        logprobs = log_softmax(oracle.logits(tokens[first:end]))
        nll += [-logprobs[place - first - 1, tokens[place]] for place in range(len(nll) + 1, end)]
        begin += stride
    return float(np.mean(nll))


def sliding_window_nll(
    oracle: ReferenceModel, tokens: list[int], context: int, stride: int
) -> tuple[float, int]:
    """Mean negative log-likelihood and the number of tokens that it is said to be of.

    As https://huggingface.co/docs/transformers/perplexity has it: a window's mean over the tokens
    that no window before held, times their number less one.
    """
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        logprobs = log_softmax(oracle.logits(tokens[begin:end]))
        new = range(max(previous_end, begin + 1), end)
        if new:
            mean = -np.mean([logprobs[place - begin - 1, tokens[place]] for place in new])
            total += mean * (end - previous_end - 1)
            count += end - previous_end - 1
        previous_end = end
        if end == len(tokens):
            break
    return total / count, count


@pytest.mark.parametrize(("kv_dtype", "bound"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_rounded_kv_cache(tmp_path, kv_dtype, bound):
    """Keys and values in 16 bits cost no more than transformers loses in that type."""
    setting = {"seed": 31, "dtype": "float32", "num_layers": 3}
    write_random_checkpoint(tmp_path, **setting)
    tokens = random_tokens(setting, seed=2, count=150)
    engine = clusterfusion.Engine(tmp_path, device="cpu", kv_dtype=kv_dtype)
    exact = ReferenceModel(tmp_path).logits(tokens)
    assert ERROR_BOUND < relative_error(engine.logits(tokens), exact) < bound


@pytest.mark.parametrize("shape", range(0, NUM_RANDOM_SHAPES, 10))
def test_live_transformers(shape, tmp_path):
    """Where transformers runs: its error, here and now, is no smaller than the engine's."""
    pytest.importorskip("torch", reason="torch is not installed: recordings stand for it")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import transformers_logits

    setting = random_setting(shape)
    if setting["hidden_act"] == "linear" or setting["max_positions"] < 8:
        setting |= {"hidden_act": "gelu", "max_positions": 90}
    tokens = random_tokens(setting, shape, count=min(90, setting["max_positions"]))
    write_random_checkpoint(tmp_path, **setting)
    exact = transformers_logits(tmp_path, tokens, "float64")
    logits = clusterfusion.Engine(tmp_path, device="cpu").logits(tokens)
    assert_accurate(logits, exact, ERROR_BOUND)
    theirs = relative_error(transformers_logits(tmp_path, tokens, setting["dtype"]), exact)
    if setting["dtype"] != "float32":
        assert relative_error(logits, exact) < theirs / 100
