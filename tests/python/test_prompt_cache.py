"""Prompts that are saved to files and loaded again, from Python and from the command line."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpoints import write_random_checkpoint
from clusterfusion import Engine

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("CLUSTERFUSION_BIN") or shutil.which("clusterfusion")
needs_program = pytest.mark.skipif(PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN")
OPTIONS = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 1}


def checkpoint(folder: Path, seed: int) -> Path:
    return write_random_checkpoint(folder, vocab_size=400, max_positions=600, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint"), 5)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 400 for i in range(length)]


def as_alone(folder: Path, prompt: list[int]):
    return Engine(folder, prefix_cache=False).generate(prompt, **OPTIONS)


def test_texts_are_those_without(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    prompt = prompt_of(300)
    assert Engine(folder).save_prompt_cache(prompt, file) == 256
    assert os.listdir(tmp_path) == ["prompt.cache"]
    for longer in (prompt, prompt + prompt_of(100, 2)):
        engine = Engine(folder, threads=1)
        assert engine.load_prompt_cache(file, longer) == 256
        found = engine.generate(longer, **OPTIONS)
        assert found.statistics.prefix_hit_tokens == 256
        assert (found.tokens, found.logprobs) == (
            as_alone(folder, longer).tokens,
            as_alone(folder, longer).logprobs,
        )


def test_other_libraries_can_look_into_it(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    file = tmp_path / "prompt.cache"
    engine = Engine(folder)
    engine.save_prompt_cache(prompt_of(130), file)
    tensors = safetensors.load_file(file)
    assert tensors["tokens"].tolist() == prompt_of(128)
    assert tensors["pages"].shape == (2, 64 * engine.info.kv_bytes_per_position)


def test_checksums_are_those_of_xxhash(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    xxhash = pytest.importorskip("xxhash")
    file = tmp_path / "prompt.cache"
    Engine(folder).save_prompt_cache(prompt_of(130), file)
    tensors = safetensors.load_file(file)
    checksums = [
        xxhash.xxh64(
            tensors["pages"][page].tobytes(),
            seed=xxhash.xxh64(tensors["tokens"][: 64 * (page + 1)].tobytes()).intdigest(),
        ).intdigest()
        for page in range(2)
    ]
    assert tensors["page_checksums"].tolist() == checksums


def test_a_copy_of_the_checkpoint_is_the_same_model(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    Engine(folder).save_prompt_cache(prompt_of(64), file)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert Engine(copy, context=200).load_prompt_cache(file) == 64


def test_what_does_not_fit_is_refused(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    engine = Engine(folder)
    engine.save_prompt_cache(prompt_of(130), file)
    other = checkpoint(tmp_path / "other", 6)
    with pytest.raises(ValueError, match=r"expected keys and values of the model in .*found those"):
        Engine(other).load_prompt_cache(file)
    own = engine.info.kv_dtype
    other_type = "float16" if own == "float32" else "float32"
    with pytest.raises(ValueError, match=f'of type "{other_type}".*found "{own}"'):
        Engine(folder, kv_dtype=other_type).load_prompt_cache(file)
    with pytest.raises(ValueError, match="of its 128 tokens, token 0 is"):
        engine.load_prompt_cache(file, prompt_of(130, 2))
    with pytest.raises(ValueError, match="ends after 100 of them"):
        engine.load_prompt_cache(file, prompt_of(100))
    with pytest.raises(ValueError, match=r"prompt has 63 tokens.*nothing to save"):
        engine.save_prompt_cache(prompt_of(63), tmp_path / "short")
    with pytest.raises(ValueError, match="prefix_cache"):
        Engine(folder, prefix_cache=False).load_prompt_cache(file)
    with pytest.raises(ValueError, match="saved with --prompt-cache"):
        engine.load_prompt_cache(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        engine.load_prompt_cache(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="cannot write"):
        engine.save_prompt_cache(prompt_of(64), tmp_path / "no" / "folder")
    with pytest.raises(IndexError):
        engine.save_prompt_cache([400] * 64, tmp_path / "outside")
    with pytest.raises(TypeError, match="path: expected str"):
        engine.load_prompt_cache(5)
    with engine.ablate(mlps=[0]), pytest.raises(ValueError, match="steered or ablated"):
        engine.save_prompt_cache(prompt_of(64), tmp_path / "ablated")
    assert sorted(os.listdir(tmp_path)) == ["other", "prompt.cache"]


def test_damaged_files_give_no_wrong_text(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    prompt = prompt_of(130)
    Engine(folder).save_prompt_cache(prompt, file)
    whole = file.read_bytes()
    expected = as_alone(folder, prompt).tokens
    choose = random.Random(1)
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[choose.randrange(1200, len(whole))] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        engine = Engine(folder)
        with pytest.raises(ValueError, match=r"damaged: page . of 2"):
            engine.load_prompt_cache(file)
        assert engine.generate(prompt, **OPTIONS).tokens == expected
        file.write_bytes(whole[: choose.randrange(1, len(whole))])
        with pytest.raises(ValueError, match=r"truncated|fewer than the 8"):
            engine.load_prompt_cache(file)


def generate(folder: Path, prompt: list[int], *arguments: str | Path, code: int = 0):
    command = [PROGRAM, "generate", folder, "--prompt-tokens", ",".join(map(str, prompt))]
    command += ["-n", "12", "--temperature", "1", "--seed", "3", "--ignore-eos", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_on_a_gpu(gpu, tmp_path):
    """Whole pieces of prompts are saved there, and each mode has bits of its own."""
    folder = write_random_checkpoint(
        tmp_path / "checkpoint", hidden_size=128, vocab_size=400, max_positions=4200
    )
    prompt = prompt_of(2500)
    for mode in ("latency", "throughput"):
        options = {"device": gpu, "mode": mode, "context": 3000}
        file = tmp_path / mode
        saved = Engine(folder, **options).save_prompt_cache(prompt, file)
        engine = Engine(folder, **options)
        assert engine.load_prompt_cache(file, prompt) == saved >= 2048
        found = engine.generate(prompt, **OPTIONS)
        assert found.statistics.prefix_hit_tokens == saved
        alone = Engine(folder, prefix_cache=False, **options).generate(prompt, **OPTIONS)
        assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)
    if gpu == "cuda":
        with pytest.raises(ValueError, match=r"mode latency.*mode throughput"):
            Engine(folder, device=gpu, context=3000).load_prompt_cache(tmp_path / "throughput")


@needs_program
def test_command_line(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    prompt = prompt_of(200)
    longer = prompt + prompt_of(50, 2)
    plain = json.loads(generate(folder, longer, "--json", "-q").stdout)
    first = generate(folder, prompt, "--prompt-cache", file)
    assert f"prompt cache: 192 of 200 tokens saved to {file}\n" in first.stderr
    assert first.stdout == generate(folder, prompt).stdout
    written = file.read_bytes()
    second = generate(folder, longer, "--prompt-cache", file, "--json")
    assert f"prompt cache: 192 of 250 tokens loaded from {file}\n" in second.stderr
    found = json.loads(second.stdout)
    assert found["tokens"] == plain["tokens"]
    assert found["statistics"]["prefix_hit_tokens"] == 192
    assert file.read_bytes() == written
    assert os.listdir(tmp_path) == ["prompt.cache"]

    refused = generate(folder, prompt_of(200, 2), "--prompt-cache", file, code=2)
    assert (refused.stdout, "is of another prompt" in refused.stderr) == ("", True)
    refused = generate(folder, prompt, "--prompt-cache", file, "--kv-dtype", "float16", code=2)
    assert "float16" in refused.stderr
    file.write_bytes(written[:-1])
    refused = generate(folder, prompt, "--prompt-cache", file, code=1)
    assert "truncated" in refused.stderr
    generate(folder, prompt, "--prompt-cache", file, "--no-prefix-cache", code=2)
    generate(folder, prompt, "--prompt-cache", "", code=2)


@needs_program
def test_commands_of_the_documentation(demo_model, tmp_path):
    lines = (ROOT / "docs" / "batching.md").read_text().splitlines()
    commands = [line.split() for line in lines if line.startswith("    clusterfusion generate")]
    article = "It was a dark and stormy night, and nobody was at home. " * 8
    (tmp_path / "article.txt").write_text(article)
    (tmp_path / "article-and-question.txt").write_text(article + "Who was at home?")
    told = []
    for _, *words in commands:
        words[words.index("models/demo")] = str(demo_model)
        done = subprocess.run([PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told += re.findall(r"^prompt cache: (\d+) of \d+ tokens (.*)$", done.stderr, re.MULTILINE)
    assert [words for _, words in told] == ["saved to article.kv", "loaded from article.kv"]
    assert told[0][0] == told[1][0]


@needs_program
def test_ctrl_c_while_a_prompt_is_read_leaves_no_file(tmp_path):
    folder = write_random_checkpoint(
        tmp_path / "slow", vocab_size=400, max_positions=2048, hidden_size=512, num_layers=12
    )
    file = tmp_path / "prompt.cache"
    command = [PROGRAM, "generate", folder, "--prompt-cache", file, "--threads", "1"]
    command += ["--prompt-tokens", ",".join(map(str, prompt_of(2000)))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("prompt.cache.*.part")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert os.listdir(tmp_path) == ["slow"]
