"""What the tests of every family of models ask of an engine."""

import random

import clusterfusion
import numpy as np
from recordings import FamilyRecord
from reference_model import relative_error

# The engine's activations are float32 whatever the checkpoint's type, so one bound holds for all:
# no larger than the smallest error that transformers makes anywhere in the family in float32.
ERROR_BOUND = 1e-6


def transformers_error(record: FamilyRecord, dtype: str) -> float:
    """Of its attention implementations the one with the smaller error."""
    return min(record.errors[f"sdpa_{dtype}"], record.errors[f"eager_{dtype}"])


def random_tokens(setting: dict, seed: int, count: int | None = None) -> list[int]:
    """As many tokens as the context holds, or a random number of them, or `count`."""
    draw = random.Random(seed)
    longest = setting.get("max_positions", 256)
    count = count or draw.choice([longest, draw.randint(1, longest)])
    return [draw.randrange(setting.get("vocab_size", 320)) for _ in range(count)]


def assert_accurate(logits: np.ndarray, exact: np.ndarray, bound: float) -> None:
    """Over all positions together, and at the worst one within three times as much."""
    assert logits.dtype == np.float32
    assert logits.shape == exact.shape
    assert relative_error(logits, exact) <= bound
    by_position = np.linalg.norm(logits - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert by_position.max() <= 3 * bound


def assert_decode_continues_prefill(
    engine: clusterfusion.Engine, tokens: list[int], setting: dict
) -> None:
    """Tokens decoded one by one have the log-probabilities that a longer prompt gives them."""
    options = {"max_new_tokens": 6, "logprobs": 5, "ignore_eos": True}
    room = setting["max_positions"] - len(tokens)
    if room == 0:
        return
    first = engine.generate(tokens, **options)
    assert len(first.tokens) == min(6, room)
    assert first.finish_reason == ("token_limit" if room >= 6 else "context_limit")
    for done in range(1, len(first.tokens)):
        again = engine.generate(tokens + first.tokens[:done], **options)
        both = len(first.tokens) - done
        assert again.tokens[:both] == first.tokens[done:]
        assert again.logprobs[:both] == first.logprobs[done:]
