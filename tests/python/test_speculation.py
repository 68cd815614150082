"""Drafts from Python and from the command line: the same texts, and what is refused."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import write_random_checkpoint
from clusterfusion import Engine
from conftest import ROOT

PROGRAM = os.environ.get("CLUSTERFUSION_BIN") or shutil.which("clusterfusion")
PROMPT = "The sea was calm. The sea was calm. The sea was"
OPTIONS = [
    {"max_new_tokens": 60},
    {"max_new_tokens": 60, "temperature": 0.8, "seed": 5, "top_p": 0.95, "logprobs": 3},
    {"max_new_tokens": 60, "temperature": 1.0, "seed": 2, "repetition_penalty": 1.2, "stop": "the"},
    {"max_new_tokens": 60, "temperature": 0.5, "no_repeat_ngram_size": 3, "logit_bias": {7: 3.0}},
]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer of its own."""
    return write_random_checkpoint(
        tmp_path_factory.mktemp("stranger"),
        vocab_size=400,
        max_positions=300,
        tokenizer="train",
        seed=5,
    )


@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_a_draft_changes_no_text(demo_model, draft):
    plain = Engine(demo_model, draft="none")
    drafted = Engine(
        demo_model, draft=demo_model if draft == "itself" else draft, draft_tokens=12, threads=1
    )
    assert plain.info.draft == ""
    assert drafted.info.draft == (str(demo_model) if draft == "itself" else "ngram")
    for options in OPTIONS:
        alone = plain.generate(PROMPT, **options)
        text = drafted.generate(PROMPT, **options)
        assert (text.tokens, text.text, text.finish_reason, text.logprobs) == (
            alone.tokens,
            alone.text,
            alone.finish_reason,
            alone.logprobs,
        )
        streamed = drafted.stream(PROMPT, **options)
        assert "".join(event.text for event in streamed) == alone.text
        assert alone.statistics.draft_steps == 0
        # A burst may go on behind the end of a text.
        assert alone.statistics.decode_steps >= len(alone.tokens) - 1
        statistics = text.statistics
        assert statistics.draft_accepted <= statistics.draft_proposed
        assert statistics.draft_steps <= statistics.decode_steps
        if text.finish_reason == "token_limit":
            assert statistics.decode_steps < len(text.tokens)


def test_other_tokens_are_refused_by_name(demo_model, stranger):
    with pytest.raises(ValueError, match=r"draft .*does not fit .*token \d+ is .* in the draft"):
        Engine(demo_model, draft=stranger)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draft": "nowhere/at/all"}, FileNotFoundError, "nowhere/at/all"),
        ({"draft": 5}, TypeError, "path"),
        ({"draft": ""}, ValueError, "draft: expected .*, found an empty text"),
        ({"draft": "ngram", "draft_tokens": 0}, ValueError, r"draft_tokens must be in \[1, 15\]"),
        ({"draft": "ngram", "draft_tokens": 16}, ValueError, r"draft_tokens must be in \[1, 15\]"),
        ({"draft": "ngram", "draft_tokens": "8"}, TypeError, "draft_tokens"),
    ],
)
def test_impossible_options(demo_model, options, error, message):
    with pytest.raises(error, match=message):
        Engine(demo_model, **options)


def generate(*arguments: object) -> subprocess.CompletedProcess:
    command = [PROGRAM, "generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN")
class TestProgram:
    def test_a_draft_changes_no_text(self, demo_model):
        common = (demo_model, "-p", PROMPT, "-n", 50, "--json", "--threads", 1, "--seed", 4)
        for sampling in ((), ("--temperature", 0.7)):
            plain = json.loads(generate(*common, *sampling).stdout)
            for draft in ("ngram", demo_model):
                ended = generate(*common, *sampling, "--draft", draft, "--draft-tokens", 5)
                assert ended.returncode == 0, ended.stderr
                document = json.loads(ended.stdout)
                assert document["tokens"] == plain["tokens"]
                statistics = document["statistics"]
                assert statistics["draft_accepted"] <= statistics["draft_proposed"]
                if statistics["draft_steps"]:
                    mean = statistics["draft_accepted"] / statistics["draft_steps"]
                    assert statistics["mean_accepted"] == pytest.approx(mean)
                    proposed = statistics["draft_proposed"]
                    noun = "token" if proposed == 1 else "tokens"
                    assert f"draft: {proposed} {noun} " in ended.stderr

    def test_what_is_no_draft(self, demo_model, stranger):
        refused = generate(demo_model, "-p", PROMPT, "--draft", stranger)
        assert refused.returncode != 0
        assert "does not fit" in refused.stderr
        missing = generate(demo_model, "-p", PROMPT, "--draft", "no/such/folder")
        assert missing.returncode != 0
        assert "no/such/folder" in missing.stderr
        many = generate(demo_model, "-p", PROMPT, "--draft", "ngram", "--draft-tokens", 99)
        assert many.returncode != 0
        assert "--draft-tokens must be in [1, 15]" in many.stderr
        nothing = generate(demo_model, "-p", PROMPT, "--draft", "")
        assert nothing.returncode == 2
        assert "--draft: expected none, ngram or a checkpoint, found nothing" in nothing.stderr


def test_page_about_speculation(demo_model, monkeypatch, capsys):
    """Its Python runs as it stands there, and so does its command."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/speculation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert "guesses were right" in capsys.readouterr().out
    (command,) = re.findall(r"^\$ clusterfusion (.*)$", page, re.MULTILINE)
    if PROGRAM is None:
        pytest.skip("no program: set CLUSTERFUSION_BIN")
    run = subprocess.run(f"{PROGRAM} {command}", shell=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
