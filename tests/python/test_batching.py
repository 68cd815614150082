"""Texts that are computed together, from Python and from the command line."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import write_random_checkpoint
from clusterfusion import Engine

SAMPLED = {"temperature": 1.0, "seed": 7, "ignore_eos": True, "max_new_tokens": 20}
PAGE = 64
PROGRAM = os.environ.get("CLUSTERFUSION_BIN") or shutil.which("clusterfusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        vocab_size=400,
        max_positions=300,
        tokenizer="train",
        seed=5,
    )


def prompt_of(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 400 for i in range(length)]


def test_samples_are_the_texts_of_their_seeds(folder):
    engine = Engine(folder)
    prompts = [prompt_of(1, 70), prompt_of(2, 5)]
    samples = engine.generate(prompts, n=3, **SAMPLED)
    assert [len(one) for one in samples] == [3, 3]
    for prompt, texts in zip(prompts, samples, strict=True):
        for i, text in enumerate(texts):
            alone = engine.generate(prompt, **{**SAMPLED, "seed": 7 + i})
            assert text.tokens == alone.tokens
            assert text.text == alone.text
    assert [text.statistics.prefix_hit_tokens for text in samples[0]] == [0, 70, 70]
    assert [one.tokens for one in engine.generate(prompts[0], n=1, **SAMPLED)] == [
        samples[0][0].tokens
    ]
    with engine.stream(prompts, n=2, **SAMPLED) as stream:
        assert {event.index for event in stream} == {0, 1, 2, 3}


def test_little_memory_changes_no_text(folder):
    prompts = [prompt_of(i, 40) for i in range(6)]
    options = {**SAMPLED, "max_new_tokens": 60}
    plain = Engine(folder, max_sequences=1, prefix_cache=False)
    page_bytes = plain.info.kv_bytes_per_position * PAGE
    tight = Engine(folder, kv_bytes=5 * page_bytes)
    assert tight.info.kv_bytes == 5 * page_bytes
    texts = tight.generate(prompts, **options)
    assert [one.tokens for one in texts] == [
        plain.generate(prompt, **options).tokens for prompt in prompts
    ]
    statistics = tight.serving_statistics()
    assert statistics.preemptions == sum(one.statistics.preemptions for one in texts)
    assert (statistics.sequences_active, statistics.sequences_waiting) == (0, 0)
    assert statistics.kv_pages == 5
    assert statistics.kv_pages_in_use == statistics.kv_pages_cached <= 5
    with pytest.raises(MemoryError, match="may need 2 pages of 64 positions"):
        Engine(folder, kv_bytes=page_bytes).generate(prompts[0], **options)


def test_threads_find_each_others_prefixes(folder):
    engine = Engine(folder)
    prompt = prompt_of(3, 200)
    first = engine.generate(prompt, **SAMPLED)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: engine.generate(prompt, **SAMPLED), range(4)))
    assert {tuple(one.tokens) for one in others} == {tuple(first.tokens)}
    assert {one.statistics.prefix_hit_tokens for one in others} == {3 * PAGE}
    statistics = engine.serving_statistics()
    assert (statistics.prompt_tokens, statistics.prefix_hit_tokens) == (1000, 4 * 3 * PAGE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequences": 0}, "max_sequences"),
        ({"kv_bytes": -1}, "kv_bytes"),
        ({"kv_bytes": 10}, "a page of the KV cache"),
    ],
)
def test_impossible_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(folder, **options)


def test_impossible_numbers_of_samples(folder):
    with pytest.raises(ValueError, match="n: expected"):
        Engine(folder).generate([1], n=0)


@pytest.mark.skipif(PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN")
def test_samples_from_the_command_line(folder):
    def run(*arguments: str) -> str:
        command = [PROGRAM, "generate", str(folder), "--prompt-tokens", "1,2,3", "-n", "8"]
        command += ["--temperature", "1", "--ignore-eos", "-q", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    samples = json.loads(run("--seed", "4", "--num-samples", "3", "--json"))["samples"]
    alone = [json.loads(run("--seed", str(seed), "--json")) for seed in (4, 5, 6)]
    assert [one["tokens"] for one in samples] == [one["tokens"] for one in alone]
    text = run("--seed", "4", "--num-samples", "3")
    expected = "\n".join(f"--- sample {i} ---\n{one['text']}" for i, one in enumerate(alone))
    assert text == expected + "\n"
    lines = [json.loads(line) for line in run("--num-samples", "2", "--json-lines").splitlines()]
    assert [line["sample"] for line in lines] == [0] * 8 + [1] * 8 + [0, 1]
