"""Checkpoint folders as people have them: odd, but readable, or broken in a way that has a remedy.

Each opens like the plain one beside it, or says what is the matter and what to do.
"""

import json
import os
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import train_tokenizer, write_random_checkpoint
from clusterfusion import Engine
from reference_model import ReferenceModel
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("CLUSTERFUSION_BIN")
TEXT = "It was the best of times"
SETTING = {"hidden_size": 32, "num_heads": 2, "vocab_size": 320, "max_positions": 64}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
needs_program = pytest.mark.skipif(PROGRAM is None, reason="CLUSTERFUSION_BIN is not set")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_random_checkpoint(tmp_path / "model", **SETTING, tokenizer="train")


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def quiet_engine(folder: Path) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Engine(folder, device="cpu")


# Weights.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("padding", range(8))
def test_data_may_begin_at_any_byte(tmp_path, dtype, padding):
    """As safetensors before 0.3.1 and other writers leave it; the reference library loads it."""
    folder = write_random_checkpoint(tmp_path, **SETTING, dtype=dtype)
    expected = quiet_engine(folder).logits(TOKENS)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    if dtype != "bfloat16":  # which NumPy does not have
        assert load_file(path)
    size = 4 if dtype == "float32" else 2
    if (8 + len(header)) % size == 0:
        engine = quiet_engine(folder)
    else:
        with pytest.warns(UserWarning, match="copied into memory.*save_file"):
            engine = Engine(folder, device="cpu")
    np.testing.assert_array_equal(engine.logits(TOKENS), expected)


@pytest.mark.parametrize("base", ["float16", "float32"])
@pytest.mark.parametrize("wide", ["embed_in", "embed_out", "mlp.dense_h_to_4h.weight"])
def test_matrices_may_have_several_dtypes(tmp_path, base, wide):
    folder = write_random_checkpoint(tmp_path, **SETTING, dtype="float32")
    other = {"float16": np.float32, "float32": np.float16}[base]
    tensors = {
        name: tensor.astype(other if wide in name else base)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="more than one dtype"):
        engine = Engine(folder, device="cpu")
    assert engine.config.dtype == base
    exact = ReferenceModel(folder).logits(TOKENS)
    assert np.abs(engine.logits(TOKENS) - exact).max() < 1e-4


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
LFS_POINTER += b"\nsize 123456789\n"


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "config.json",
        "generation_config.json",
    ],
)
def test_git_lfs_pointer(folder, file):
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(LFS_POINTER)
    with pytest.raises(ValueError, match=rf"{file} is a Git LFS pointer.*git lfs pull"):
        Engine(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_byte_order_marks(folder, file):
    if file == "generation_config.json":
        (folder / file).write_text('{"eos_token_id": 0}')
    expected = quiet_engine(folder).generate(TEXT, max_new_tokens=5).tokens
    text = (folder / file).read_text()
    (folder / file).write_text(text, encoding="utf-8-sig")
    assert quiet_engine(folder).generate(TEXT, max_new_tokens=5).tokens == expected
    (folder / file).write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=f"{file} is UTF-16.*save it as UTF-8"):
        Engine(folder)


def test_weights_that_become_shorter_while_they_are_used(folder):
    engine = quiet_engine(folder)
    other = quiet_engine(write_random_checkpoint(folder.parent / "other", **SETTING))
    expected = other.generate(TOKENS, max_new_tokens=5).tokens
    engine.logits(TOKENS)
    os.truncate(folder / "model.safetensors", 4096)
    for call in (
        lambda: engine.generate(TOKENS),
        lambda: engine.score(TOKENS),
        lambda: engine.logits(TOKENS),
    ):
        with pytest.raises(OSError, match=r"model\.safetensors became shorter"):
            call()
    assert other.generate(TOKENS, max_new_tokens=5).tokens == expected


@needs_program
def test_program_with_weights_that_become_shorter(tmp_path):
    folder = write_random_checkpoint(
        tmp_path, **{**SETTING, "max_positions": 100_000}, tokenizer="train"
    )
    process = subprocess.Popen(
        [PROGRAM, "generate", folder, "-p", TEXT, "-n", "90000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    os.truncate(folder / "model.safetensors", 0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith(b"clusterfusion: error: ") and b"became shorter" in err
    assert err.count(b"\n") == 1


# Tokenizers.


def test_files_as_training_leaves_them(folder):
    """truncation and padding are ignored, as transformers does; old files name no model type."""
    path = folder / "tokenizer.json"
    plain = Tokenizer.from_file(str(path))
    expected = plain.encode(TEXT * 9).ids
    plain.enable_truncation(4)
    plain.enable_padding(length=300, pad_id=0, pad_token="<|endoftext|>")
    plain.save(str(path))
    assert quiet_engine(folder).encode(TEXT * 9) == expected
    content = json.loads(path.read_text())
    del content["model"]["type"]
    path.write_text(json.dumps(content))
    assert quiet_engine(folder).encode(TEXT * 9) == expected
    plain.no_truncation()
    plain.no_padding()
    del content["truncation"], content["padding"]
    assert Tokenizer.from_str(json.dumps(content)).encode(TEXT * 9).ids == expected


@pytest.mark.parametrize("content", ["café", "ilÖveyou", "đem", "日本"])
@pytest.mark.parametrize("normalized", [True, False])
def test_added_tokens_of_the_byte_level_alphabet(folder, content, normalized):
    """tokenizers gives back other text: its issues 1392, 1915, 1996."""
    path = str(folder / "tokenizer.json")
    reference = Tokenizer.from_file(path)
    reference.add_tokens([AddedToken(content, normalized=normalized)])
    reference.save(path)
    tokenizer = clusterfusion.Tokenizer(path)
    text = f"hi {content} there"
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_a_padded_vocabulary(tmp_path):
    folder = write_random_checkpoint(tmp_path, **{**SETTING, "vocab_size": 500})
    train_tokenizer(folder, 320)
    engine = quiet_engine(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [300, 499, 5, 320]
    assert engine.decode(tokens) == reference.decode(tokens)
    assert engine.tokenizer.decode(tokens) == reference.decode(tokens)
    assert engine.generate(tokens, max_new_tokens=2).prompt_tokens == tokens
    with pytest.raises(IndexError, match=r"tokens\[1\] is 500, expected a token id in \[0, 500\)"):
        engine.decode([3, 500])
    with pytest.raises(IndexError, match="-1"):
        engine.tokenizer.decode([-1])
    if PROGRAM is None:
        return
    ids = ",".join(map(str, tokens))
    ended = run("tokenize", folder, "--decode", "-p", ids)
    assert (ended.returncode, ended.stdout) == (0, reference.decode(tokens))
    assert "warning: 2 of 4 ids" in ended.stderr and "499 at index 1" in ended.stderr
    ended = run("generate", folder, "--prompt-tokens", ids, "-n", 0, "--echo", "-q")
    assert (ended.returncode, ended.stdout) == (0, reference.decode(tokens) + "\n")


def test_one_token_more_than_the_model_has(folder):
    """As after add_special_tokens() without resizing the embeddings; transformers opens it."""
    path = str(folder / "tokenizer.json")
    expected = quiet_engine(folder).generate(TEXT, max_new_tokens=5).tokens
    reference = Tokenizer.from_file(path)
    size = reference.get_vocab_size()
    assert size == SETTING["vocab_size"]
    reference.add_special_tokens(["[PAD]"])
    reference.save(path)
    with pytest.warns(UserWarning, match=r"ids up to 320.*vocab_size is 320.*\"\[PAD\]\""):
        engine = Engine(folder)
    assert engine.generate(TEXT, max_new_tokens=5).tokens == expected
    for call in (engine.generate, engine.score, engine.logits, engine.perplexity):
        with pytest.raises(IndexError, match=r"is 320, expected a token id in \[0, 320\)"):
            call("It [PAD]")
    if PROGRAM is not None:
        ended = run("generate", folder, "-p", "It", "-n", 1)
        assert ended.returncode == 0
        assert ended.stderr.startswith("clusterfusion: warning: ")
        assert run("generate", folder, "-p", "[PAD]", "-n", 1).returncode == 2


PAD = {"content": "[PAD]", "lstrip": False, "normalized": False, "rstrip": False}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", {"add_prefix_space": True}, ["add_prefix_space", "true"]),
        ("tokenizer_config.json", {"add_bos_token": True}, ["add_bos_token"]),
        ("tokenizer_config.json", {"add_eos_token": True}, ["add_eos_token"]),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, ["pad_token", "[PAD]"]),
        ("tokenizer_config.json", {"pad_token": PAD}, ["pad_token", "[PAD]"]),
        ("tokenizer_config.json", {"extra_special_tokens": ["[A]", "[B]"]}, ["[A]", "[0]"]),
        ("tokenizer_config.json", {"extra_special_tokens": {"x": "[A]"}}, ["[A]", '"x"']),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": PAD}}, ["[PAD]", "320"]),
        ("special_tokens_map.json", {"pad_token": "[PAD]"}, ["pad_token", "[PAD]"]),
        ("special_tokens_map.json", {"additional_special_tokens": ["[A]"]}, ["[A]"]),
        ("added_tokens.json", {"[PAD]": 320}, ["[PAD]", "320"]),
        ("added_tokens.json", {"<|endoftext|>": 7}, ["endoftext", "7", "has the id 0"]),
        ("added_tokens.json", ["[PAD]"], ["object", "not used"]),
    ],
)
def test_what_files_beside_the_tokenizer_ask_for(folder, file, content, words):
    """A warning names the file and the key."""
    (folder / file).write_text(json.dumps(content))
    for opened in (Engine, clusterfusion.Tokenizer):
        with pytest.warns(UserWarning) as caught:
            opened(folder)
        message = str(caught[0].message)
        assert file in message
        assert [word for word in words if word not in message] == []
        assert caught[0].filename == __file__


RECORDED = json.loads((ROOT / "tests/data/autotokenizer_cases.json").read_text())


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_ids_are_those_of_autotokenizer_or_there_is_a_warning(tmp_path, name):
    """Recorded by tools/record_autotokenizer_cases.py; and no warning without need."""
    case = RECORDED["cases"][name]
    shutil.copy(ROOT / "models/demo/tokenizer.json", tmp_path)
    for file, content in case["files"].items():
        (tmp_path / file).write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = clusterfusion.Tokenizer(tmp_path)
    differs = tokenizer.encode(RECORDED["text"]) != case["ids"]
    # Version 5 of transformers has no say for add_bos_token and add_eos_token; version 4 does.
    assert bool(caught) == (differs or name in ("bos", "eos"))


def test_usual_files_beside_the_tokenizer(folder, tmp_path):
    """Those of Pythia, as published, are no news."""
    special = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 0}')
    quiet_engine(folder)


@pytest.mark.parametrize("other", ["spiece.model", "tokenizer.model", "vocab.json", None])
def test_no_tokenizer_json(folder, other):
    """One cause, one error: the same kind and the same exit code everywhere."""
    (folder / "tokenizer.json").unlink()
    if other:
        (folder / other).touch()
    engine = quiet_engine(folder)
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(TEXT),
        lambda: engine.generate([1], stop="x"),
        lambda: engine.score(TEXT),
        lambda: engine.perplexity(TEXT),
        lambda: engine.encode(TEXT),
        lambda: clusterfusion.Tokenizer(folder),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json") as caught:
            call()
        assert (other or "copy it there") in str(caught.value)
    if PROGRAM is not None:
        for command in ("generate", "score", "perplexity", "tokenize"):
            ended = run(command, folder, "-p", TEXT)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert "has no tokenizer.json" in ended.stderr


# generation_config.json.


def test_generation_config(folder):
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engine = quiet_engine(folder)
    greedy = engine.generate(TEXT, ignore_eos=True)
    assert len(greedy.tokens) == 64 - len(greedy.prompt_tokens), "not by itself"
    own = engine.generate(TEXT, ignore_eos=True, seed=3, generation_config=True)
    same = {"temperature": 1.5, "top_k": 40, "max_new_tokens": 9}
    assert own.tokens == engine.generate(TEXT, ignore_eos=True, seed=3, **same).tokens
    assert own.tokens != greedy.tokens[:9]
    cool = engine.generate(TEXT, ignore_eos=True, temperature=0, generation_config=True)
    assert cool.tokens == greedy.tokens[:9]
    if PROGRAM is None:
        return
    arguments = ["generate", folder, "-p", TEXT, "--ignore-eos", "--seed", 3, "--json"]
    document = json.loads(run(*arguments, "--generation-config").stdout)
    assert document["tokens"] == own.tokens
    document = json.loads(run(*arguments, "--generation-config", "-n", 4).stdout)
    assert document["tokens"] == own.tokens[:4]
    assert json.loads(run(*arguments).stdout)["tokens"] == greedy.tokens
