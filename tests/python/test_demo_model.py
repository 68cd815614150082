"""The demo model against transformers in float32: greedy texts and perplexities."""

import hashlib
import lzma
import os

import clusterfusion
import numpy as np
import pytest
from checkpoints import weights_digest
from recordings import DemoRecord, load_demo
from tokenizers import Tokenizer

# Below this difference of two logits float32 cannot tell which token is likelier.
TIE = 1e-4


@pytest.fixture(scope="module")
def recording() -> DemoRecord:
    return load_demo()


@pytest.fixture(scope="module")
def engine(demo_model) -> clusterfusion.Engine:
    return clusterfusion.Engine(demo_model, device="cpu")


def test_recording_is_of_this_model(recording, demo_model):
    assert recording.digest == weights_digest(demo_model)
    assert recording.tokens.shape == recording.margins.shape == (200, 64)


def test_greedy_texts(recording, engine, demo_model, record_testsuite_property):
    """200 prompts x 64 tokens: the same tokens, and the text that tokenizers makes of them."""
    prompts = recording.prompts
    results = [
        result
        for start in range(0, len(prompts), 8)
        for result in engine.generate(
            prompts[start : start + 8], max_new_tokens=64, ignore_eos=True
        )
    ]
    smallest = np.sort(recording.margins.ravel())[:5]
    print("smallest differences between the two likeliest logits:", smallest)
    record_testsuite_property("demo_smallest_margins", smallest.tolist())
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    differences = []
    for number, (result, expected) in enumerate(zip(results, recording.tokens, strict=True)):
        if result.tokens != expected.tolist():
            place = int(np.flatnonzero(np.array(result.tokens) != expected)[0])
            margin = recording.margins[number, place]
            tie = " (a tie)" if margin < TIE else ""
            differences.append(f"prompt {number}, token {place}: margin {margin:.2e}{tie}")
        assert result.text == tokenizer.decode(result.tokens)
    assert differences == []


# Of each recorded text: together every text, all windows, and either method with all windows.
# With CLUSTERFUSION_ALL_PERPLEXITIES=1 each text is measured by both methods.
METHODS = [("each_token",), ("each_token", "transformers_docs"), ("transformers_docs",)]
ALL = os.environ.get("CLUSTERFUSION_ALL_PERPLEXITIES") == "1"


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_perplexities(recording, engine, number):
    """Equal within 0.001 %, for the recorded tokens of each text, window and stride."""
    assert len(recording.perplexities) == len(METHODS)
    expected = recording.perplexities[number]
    for method in METHODS[1] if ALL else METHODS[number]:
        result = engine.perplexity(
            recording.perplexity_tokens[number],
            context=expected["context"],
            stride=expected["stride"],
            method=method,
        )
        name = {"each_token": "perplexity", "transformers_docs": "documented"}[method]
        assert result.perplexity == pytest.approx(expected[name], rel=1e-5)


def test_perplexity_of_texts(recording, engine, shared_data):
    """From the text itself: the engine's tokenizer gives the recorded tokens."""
    for number, expected in enumerate(recording.perplexities):
        path = shared_data / expected["text"]
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        text = data[: expected["bytes"]]
        assert hashlib.sha256(text).hexdigest() == expected["sha256"]
        tokens = recording.perplexity_tokens[number]
        assert engine.encode(text) == tokens.tolist()
    text = text[:9000].decode(errors="ignore")
    result = engine.perplexity(text, context=256, stride=100)
    again = engine.perplexity(engine.encode(text), context=256, stride=100)
    assert result.perplexity == again.perplexity
    assert result.scored_tokens == result.total_tokens - 1
    bits = result.mean_nll * result.scored_tokens / np.log(2)
    scored = engine.decode(engine.encode(text)[1:])
    assert result.bits_per_byte == pytest.approx(bits / len(scored.encode()), rel=1e-6)


def test_live_transformers(recording, engine, demo_model):
    """Greedy texts and one perplexity again, by the transformers that is installed here."""
    pytest.importorskip("torch", reason="torch is not installed: the recording stands for it")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import load_transformers, transformers_greedy, transformers_perplexity

    model = load_transformers(demo_model, "float32")
    for prompt, expected in list(zip(recording.prompts, recording.tokens, strict=True))[::5]:
        tokens, _ = transformers_greedy(model, [prompt], 64)
        assert tokens[0].tolist() == expected.tolist()
        ours = engine.generate(prompt, max_new_tokens=64, ignore_eos=True)
        assert ours.tokens == tokens[0].tolist()
    tokens = recording.perplexity_tokens[0][:4000]
    theirs = transformers_perplexity(model, tokens, 256, 128)
    ours = engine.perplexity(tokens, context=256, stride=128)
    assert ours.perplexity == pytest.approx(theirs["documented"], rel=1e-5)
