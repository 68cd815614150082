"""A trained Llama, SmolLM2-135M-Instruct, against recordings of transformers in float32.

Skipped unless CLUSTERFUSION_SMOLLM2 names a folder that tools/unpack_smollm2.py wrote.
"""

import json
import os
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import weights_digest
from recordings import DATA

FOLDER = os.environ.get("CLUSTERFUSION_SMOLLM2")
RECORD = json.loads((DATA / "smollm2_reference.json").read_text())
# Below this difference of two logits float32 cannot tell which token is likelier.
TIE = 1e-4

needs_model = pytest.mark.skipif(
    FOLDER is None, reason="CLUSTERFUSION_SMOLLM2 names no folder of tools/unpack_smollm2.py"
)


@pytest.fixture(scope="module")
def engine() -> clusterfusion.Engine:
    return clusterfusion.Engine(FOLDER, device="cpu")


def test_recorded_texts_have_no_ties():
    assert len(RECORD["texts"]) == 6
    assert min(text["smallest_margin"] for text in RECORD["texts"]) > TIE


@needs_model
def test_recording_is_of_this_model():
    assert weights_digest(Path(FOLDER)) == RECORD["digest"]


@needs_model
def test_greedy_texts(engine):
    prompts = [text["prompt"] for text in RECORD["texts"]]
    expected = [text["tokens"] for text in RECORD["texts"]]
    results = engine.generate(prompts, max_new_tokens=len(expected[0]), ignore_eos=True)
    assert [result.tokens for result in results] == expected


@needs_model
def test_perplexity(engine):
    recorded = RECORD["perplexity"]
    window = {name: recorded[name] for name in ("context", "stride")}
    found = engine.perplexity(recorded["tokens"], **window).perplexity
    np.testing.assert_allclose(found, recorded["value"], rtol=1e-5)
