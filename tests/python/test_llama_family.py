"""Llama, Mistral, Qwen2 and Qwen3 against the float64 oracle, over recorded and random shapes.

What test_family.py is for GPT-NeoX. Where torch and transformers are installed, the same
checkpoints also run there, live.
"""

import random

import clusterfusion
import numpy as np
import pytest
from checkpoints import DTYPE_TAGS, weights_digest
from family_checks import (
    assert_accurate,
    assert_decode_continues_prefill,
    random_tokens,
    transformers_error,
)
from llama_checkpoints import ARCHITECTURES, ROPE_SCALINGS, write_llama_checkpoint
from recordings import FamilyRecord, load_family
from reference_llama import ReferenceLlama
from reference_model import log_softmax, relative_error

FAMILY = load_family("llama")
NUM_RANDOM_SHAPES = 120

# Of random shapes: where YaRN's factors make attention sharper, rounding counts for more than in
# test_family.py. Recorded ones are held to transformers' own error in float32.
ERROR_BOUND = 2e-6

# Nothing round: 9 heads over 3, as wide as they like.
ODD = {
    "family": "qwen3",
    "hidden_size": 100,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "intermediate_size": 77,
    "attention_bias": True,
}


def random_setting(seed: int) -> dict:
    """A small checkpoint of any shape, awkward ones preferred."""
    draw = random.Random(seed)
    family = draw.choice(list(ARCHITECTURES))
    num_kv_heads = draw.randint(1, 3)
    num_heads = num_kv_heads * draw.randint(1, 4)
    head_dim = draw.choice([2, 8, 10, 16, 24, 34, 64, 80, 128])
    own_head_dim = family == "qwen3" or draw.random() < 0.6
    if not own_head_dim:
        hidden = num_heads * min(head_dim, 24)
    elif family == "llama":  # transformers 5 wants a multiple there
        hidden = num_heads * draw.randint(1, 20)
    else:
        hidden = draw.randint(3, 160)
    return {
        "family": family,
        "hidden_size": hidden,
        "num_layers": draw.randint(1, 3),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim if own_head_dim else None,
        "intermediate_size": draw.randint(1, 3 * hidden),
        "vocab_size": draw.choice([5, 255, 256, draw.randint(3, 900)]),
        "max_positions": draw.choice([1, 63, 64, 65, 127, 128, 129, draw.randint(2, 200)]),
        "rope": draw.choice(list(ROPE_SCALINGS)),
        "rope_theta": draw.choice([10000.0, 500000.0, 1000000.0, 37.5]),
        "eps": draw.choice([1e-6, 1e-5]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tied": draw.random() < 0.4,
        "dtype": draw.choice(list(DTYPE_TAGS)),
        "seed": 20_000 + seed,
        "prefix": draw.random() < 0.7,
        "shards": draw.choice([1, 1, 2, 5]),
        "config_style": draw.choice(["old", "new"]),
        "vector_dtype": draw.choice([None, None, None, *DTYPE_TAGS]),
    }


@pytest.fixture(params=FAMILY, ids=lambda record: record.name)
def record(request) -> FamilyRecord:
    return request.param


@pytest.fixture
def checkpoint(record, tmp_path):
    return write_llama_checkpoint(tmp_path, **record.setting)


def test_recording_spans_the_families():
    settings = [record.setting for record in FAMILY]
    combinations = {(setting["family"], setting["rope"]) for setting in settings}
    assert len(combinations) == len(ARCHITECTURES) * len(ROPE_SCALINGS)
    for key, values in {
        "dtype": set(DTYPE_TAGS),
        "tied": {True, False},
        "attention_bias": {True, False},
        "mlp_bias": {True, False},
        "config_style": {"old", "new"},
        "shards": {1, 3},
        "prefix": {True, False},
    }.items():
        assert {setting[key] for setting in settings} == values, key


def test_oracle_equals_transformers_in_float64(record, checkpoint):
    """The recorded logits, log-sum-exps and norms: the oracle is one."""
    assert weights_digest(checkpoint) == record.digest, "checkpoints are made differently now"
    exact = ReferenceLlama(checkpoint).logits(record.tokens)[record.positions]
    np.testing.assert_allclose(exact[:, record.sampled], record.logits, rtol=0, atol=1e-9)
    log_sum_exp = exact[:, 0] - log_softmax(exact)[:, 0]
    np.testing.assert_allclose(log_sum_exp, record.log_sum_exp, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(exact, axis=1), record.norm, rtol=1e-9)


def test_logits_of_the_recorded_families(record, checkpoint):
    """No larger an error than transformers' own in float32, whatever the checkpoint's type."""
    logits = clusterfusion.Engine(checkpoint, device="cpu").logits(record.tokens)
    exact = ReferenceLlama(checkpoint).logits(record.tokens)
    assert_accurate(logits, exact, transformers_error(record, "float32"))


def test_greedy_tokens_of_the_recorded_families(record, checkpoint):
    result = clusterfusion.Engine(checkpoint, device="cpu").generate(
        record.tokens[:9], max_new_tokens=len(record.greedy), ignore_eos=True
    )
    assert record.margins.min() > 1e-4, "a tie: record another seed"
    assert result.tokens == record.greedy.tolist()


@pytest.mark.parametrize("seed", range(NUM_RANDOM_SHAPES))
def test_random_shape(seed, tmp_path):
    """Accurate at every position; and the same bits for a prefix and for other thread counts."""
    setting = random_setting(seed)
    tokens = random_tokens(setting, seed)
    write_llama_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu", threads=1 + seed % 3)
    logits = engine.logits(tokens)
    assert_accurate(logits, ReferenceLlama(tmp_path).logits(tokens), ERROR_BOUND)

    count = 1 + seed * 31 % len(tokens)
    np.testing.assert_array_equal(engine.logits(tokens[:count]), logits[:count])
    other = clusterfusion.Engine(tmp_path, device="cpu", threads=1 + (seed + 1) % 3)
    np.testing.assert_array_equal(other.logits(tokens), logits)
    longest = engine.info.max_positions
    assert_decode_continues_prefill(engine, tokens[:count], setting | {"max_positions": longest})


@pytest.mark.parametrize("dtype", DTYPE_TAGS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 512, 513])
def test_page_and_chunk_borders(tmp_path, dtype, length):
    """KV pages end after 64 positions, pieces of a prefill after 512."""
    setting = ODD | {"dtype": dtype, "seed": 77, "max_positions": 640, "rope": "llama3"}
    write_llama_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu")
    tokens = random_tokens(setting, seed=3, count=530)
    logits = engine.logits(tokens[:length])
    assert_accurate(logits, ReferenceLlama(tmp_path).logits(tokens[:length]), ERROR_BOUND)
    np.testing.assert_array_equal(engine.logits(tokens)[:length], logits)
    assert_decode_continues_prefill(engine, tokens[:length], setting)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_company_and_drafts_change_no_bit(tmp_path, family):
    """Tokens and log-probabilities of each text of a batch, and with a draft, are those alone."""
    setting = {"family": family, "seed": 91, "num_heads": 6, "num_kv_heads": 2, "head_dim": 20}
    write_llama_checkpoint(tmp_path, **setting)
    engine = clusterfusion.Engine(tmp_path, device="cpu", threads=2)
    drafted = clusterfusion.Engine(tmp_path, device="cpu", draft="ngram")
    prompts = [random_tokens(setting, n, n) for n in (1, 2, 59, 63, 64, 65, 128, 200)]
    options = {"max_new_tokens": 20, "logprobs": 5, "ignore_eos": True}
    for sampling in ({}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}):
        batch = engine.generate(prompts, **options, **sampling)
        for prompt, member in zip(prompts, batch, strict=True):
            for alone in (
                engine.generate(prompt, **options, **sampling),
                drafted.generate(prompt, **options, **sampling),
            ):
                assert member.tokens == alone.tokens
                assert member.logprobs == alone.logprobs


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_kind_of_file_gives_the_same_bits(tmp_path, family):
    setting = {"family": family, "seed": 8, "attention_bias": True, "rope": "yarn"}
    tokens = random_tokens(setting, 4, 50)
    logits = []
    for number, files in enumerate(
        (
            {},
            {"shards": 3, "config_style": "new"},
            {"weights": "torch", "prefix": False},
            {"weights": "torch", "shards": 4, "config_style": "new"},
        )
    ):
        folder = write_llama_checkpoint(tmp_path / str(number), **setting, **files)
        logits.append(clusterfusion.Engine(folder, device="cpu").logits(tokens))
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


def test_scores_and_perplexity_against_the_oracle(tmp_path):
    setting = ODD | {"seed": 29, "max_positions": 64, "tied": True}
    write_llama_checkpoint(tmp_path, **setting)
    engine, oracle = clusterfusion.Engine(tmp_path, device="cpu"), ReferenceLlama(tmp_path)
    tokens = random_tokens(setting, seed=1, count=64)
    expected = log_softmax(oracle.logits(tokens))[np.arange(63), tokens[1:]]
    np.testing.assert_allclose(engine.score(tokens).logprobs, expected, atol=1e-5)
    mean = engine.perplexity(tokens, context=64, stride=64).mean_nll
    np.testing.assert_allclose(mean, -expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_hidden_states_by_transformers_names(tmp_path, family):
    setting = {"family": family, "seed": 17, "num_layers": 3, "head_dim": 24}
    write_llama_checkpoint(tmp_path, **setting)
    engine, oracle = clusterfusion.Engine(tmp_path, device="cpu"), ReferenceLlama(tmp_path)
    tokens = random_tokens(setting, seed=1, count=40)
    exact = oracle.hidden_states(tokens)
    for index, (name, state) in enumerate(engine.hidden_states(tokens).items()):
        assert name == f"hidden_states[{index}]"
        assert relative_error(np.asarray(state), exact[index]) < ERROR_BOUND
    names = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.norm"]
    attention, mlp, normed = (
        np.asarray(state) for state in engine.hidden_states(tokens, at=names).values()
    )
    added = oracle.attention(exact[1], "layers.1")
    assert relative_error(attention, added) < ERROR_BOUND
    assert relative_error(mlp, oracle.mlp(exact[1] + added, "layers.1")) < ERROR_BOUND
    assert relative_error(normed, exact[-1]) < ERROR_BOUND


def test_ablated_and_steered_as_by_hand(tmp_path):
    setting = ODD | {"seed": 18, "dtype": "float32"}
    write_llama_checkpoint(tmp_path, **setting)
    engine, oracle = clusterfusion.Engine(tmp_path, device="cpu"), ReferenceLlama(tmp_path)
    tokens = random_tokens(setting, seed=1, count=30)
    vector = np.linspace(-1, 1, 100).astype(np.float32)
    columns = slice(4 * 64, 5 * 64)
    oracle.weights["layers.0.self_attn.o_proj.weight"][:, columns] = 0
    oracle.weights["embed_tokens.weight"] += vector
    with engine.ablate(heads={0: [4]}), engine.steer({0: vector}):
        assert_accurate(engine.logits(tokens), oracle.logits(tokens), ERROR_BOUND)


def test_contexts_end_where_the_attention_would_slide(tmp_path):
    """Up to the window it makes no difference, and more is refused with its name."""
    setting = {"family": "mistral", "seed": 3, "sliding_window": 70}
    write_llama_checkpoint(tmp_path, **setting)
    with pytest.warns(UserWarning, match=r"slides over the last 70 positions.*contexts end at 70"):
        engine = clusterfusion.Engine(tmp_path, device="cpu")
    assert engine.info.max_positions == 70
    tokens = random_tokens(setting, 5, 71)
    assert_accurate(
        engine.logits(tokens[:70]), ReferenceLlama(tmp_path).logits(tokens[:70]), ERROR_BOUND
    )
    with pytest.raises(ValueError, match="the context holds 70"):
        engine.logits(tokens)


def test_yarn_extends_the_context(tmp_path):
    write_llama_checkpoint(tmp_path, rope="yarn", max_positions=40)
    assert clusterfusion.Engine(tmp_path, device="cpu").info.max_positions == 160


@pytest.mark.parametrize("shape", range(0, NUM_RANDOM_SHAPES, 4))
def test_live_transformers(shape, tmp_path):
    """Where transformers runs: its error, here and now, is no smaller than the engine's."""
    pytest.importorskip("torch", reason="torch is not installed: recordings stand for it")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import transformers_logits

    setting = random_setting(shape) | {"max_positions": 120}
    tokens = random_tokens(setting, shape, count=90)
    write_llama_checkpoint(tmp_path, **setting)
    exact = transformers_logits(tmp_path, tokens, "float64")
    logits = clusterfusion.Engine(tmp_path, device="cpu").logits(tokens)
    assert_accurate(logits, exact, ERROR_BOUND)
    theirs = relative_error(transformers_logits(tmp_path, tokens, setting["dtype"]), exact)
    if setting["dtype"] != "float32":
        assert relative_error(logits, exact) < theirs / 100
