"""Tokenizers of Llama's, Mistral's and Qwen's kinds against Hugging Face tokenizers.

CLUSTERFUSION_TOKENIZER_TEXTS says how many generated texts each kind is compared on.
"""

# ruff: noqa: RUF001

import functools
import json
import os
import struct
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import clusterfusion
import pytest
from checkpoints import write_random_checkpoint
from conftest import ROOT
from test_tokenizer import (
    added_contents,
    byte_level,
    check_decoding,
    check_encoding,
    random_ids,
    reference_ids,
)
from tokenizer_kinds import KINDS, with_awkward_tokens
from tokenizer_texts import (
    canonical_pairs,
    code_points,
    generated_bytes,
    generated_texts,
    has_no_meaning,
)
from tokenizers import Tokenizer

NUM_TEXTS = int(os.environ.get("CLUSTERFUSION_TOKENIZER_TEXTS", "3000"))
# Characters of the kinds' own.
SPELLINGS = ["▁", "▁▁ ", "<0x41>", "<0xE6>", "<unk>", "</s>", "Ġ", " ▁a", "Ab1234CD", "'S'ſ\u212a"]


@functools.cache
def kind(name: str) -> str:
    return json.dumps(KINDS[name]())


def write(folder: Path, spec: dict) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@pytest.fixture(params=KINDS)
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, json.loads(kind(request.param)))


@pytest.fixture(params=KINDS)
def awkward(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, with_awkward_tokens(json.loads(kind(request.param))))


@pytest.mark.parametrize("cut", ["whole", "lines"])
def test_written_text(plain: Path, cut: str) -> None:
    data = (ROOT / "CHANGELOG.md").read_bytes() + (ROOT / "docs/testing.md").read_bytes()
    texts = [data] if cut == "whole" else data.splitlines(keepends=True)
    check_decoding(plain, check_encoding(plain, texts))


def test_wikitext(plain: Path, shared_data: Path) -> None:
    data = (shared_data / "wikitext-2-valid.txt").read_bytes()
    check_decoding(plain, check_encoding(plain, data.splitlines(keepends=True), special=(True,)))


def test_generated_texts(awkward: Path) -> None:
    texts = generated_texts(NUM_TEXTS, 1, added_contents(awkward) + SPELLINGS)
    texts += ["", " ", "  a", "a  ", "\n", "▁"]
    ids = check_encoding(awkward, [text.encode() for text in texts])
    check_decoding(awkward, ids)


def test_broken_utf8(awkward: Path) -> None:
    check_encoding(awkward, generated_bytes(NUM_TEXTS // 3, 2, added_contents(awkward)))


def mixed_ids(path: Path) -> list[list[int]]:
    """Random ids, and runs of those for bytes."""
    lists = random_ids(path, NUM_TEXTS, 3)
    tokenizer = Tokenizer.from_file(str(path))
    characters = "é中😀".encode()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in characters]
    if None in ids:
        return lists
    starts = [one[:2] for one in lists[:200]]
    return lists + [
        start + ids[begin : begin + length] + start
        for start in starts
        for begin in (0, 1, 2, 5)
        for length in (1, 2, 3, 4)
    ]


def test_random_ids(awkward: Path) -> None:
    check_decoding(awkward, mixed_ids(awkward))


def streamed(tool: Path, path: Path, lists: list[list[int]], mode: str) -> list[str]:
    """The texts that StreamDecoder gives."""
    packed = b"".join(struct.pack(f"<I{len(ids)}i", len(ids), *ids) for ids in lists)
    result = subprocess.run([tool, path, mode], input=packed, capture_output=True, check=True)
    texts, at = [], 0
    while at < len(result.stdout):
        (length,) = struct.unpack_from("<I", result.stdout, at)
        texts.append(result.stdout[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return texts


def test_streams(awkward: Path, build_dir: Path) -> None:
    lists = mixed_ids(awkward)
    ours = clusterfusion.Tokenizer(awkward)
    for mode, skip in (("stream", True), ("stream-all", False)):
        texts = streamed(build_dir / "bin/tokenizer_tool", awkward, lists, mode)
        for ids, text in zip(lists, texts, strict=True):
            assert text == ours.decode(ids, skip_special_tokens=skip), ids


# Metaspace's decoder leaves bytes as they are spelled.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "metaspace"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Text that a kind's normalizer leaves alone comes back, byte by byte where need be."""
    ours = clusterfusion.Tokenizer(write(tmp_path, json.loads(kind(name))))
    for text in ["Hello world", "a  b\n\n  c", "naïve 東京 😀", "x\x00\x7f\u200d", "1999 + 42"]:
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["llama2", "mistral", "metaspace", "llama3"])
def test_generated_text_goes_on_from_its_prompt(name: str, tmp_path: Path) -> None:
    """The prompt's text and the new one together are what decoding all tokens gives."""
    write_random_checkpoint(
        tmp_path, hidden_size=32, num_layers=1, num_heads=2, vocab_size=2048, max_positions=128
    )
    engine = clusterfusion.Engine(write(tmp_path, json.loads(kind(name))).parent)
    start = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("").ids
    for prompt in (engine.encode("The old house"), start):
        before = engine.decode(prompt)
        for seed in range(20):
            stream = engine.stream(prompt, max_new_tokens=20, temperature=1.0, seed=seed)
            text = "".join(event.text for event in stream)
            (result,) = stream.results
            assert result.text == text
            assert before + text == engine.decode([*prompt, *result.tokens])


# --- every option that the kinds have not ---


def split(pattern: dict, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def pre_tokenized(*steps: dict) -> dict:
    """A byte-level tokenizer with these steps before the bytes."""
    last = byte_level(use_regex=False)
    return {
        **json.loads(kind("qwen")),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]},
    }


def llama2(**changes: object) -> dict:
    """Llama 2's with other parts; those of "model" by their names."""
    spec = json.loads(kind("llama2"))
    parts = {key: value for key, value in changes.items() if key in spec}
    model = {key: value for key, value in changes.items() if key not in spec}
    return {**spec, **parts, "model": {**spec["model"], **model}}


def without_some_bytes() -> dict:
    spec = llama2()
    vocab = spec["model"]["vocab"]
    for byte in (0xE6, 0x9D, 0xF0):
        token = f"<0x{byte:02X}>"
        vocab[f"unused{byte}"] = vocab.pop(token)
    return spec


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def metaspace(**changes: object) -> dict:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", **changes}


def sequence(key: str, *parts: dict) -> dict:
    return {"type": "Sequence", key: list(parts)}


SPACES = {"Regex": r"\s+"}
BEHAVIORS = ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"]
REGEXES = [
    r"[^\W\d]+|\d{2,3}",
    r"(?i:[sdmt]|ll|ve|re)",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[\p{L}&&[^a-mé]]+|(?<=\s)\S",
    r"^.|.$|\b\w\B",
    r"x*",
    r"(?=[A-Z])",
    r"(?:a|e|(?:i|o)u?)+?[n-t]",
    r"[\x{300}-\x{36F}\u0041\n]|\P{Cn}\p{M}",
]
VARIANTS: dict[str, Callable[[], dict]] = {
    **{
        f"split-{behavior}-{invert}": lambda behavior=behavior, invert=invert: pre_tokenized(
            split(SPACES, behavior, invert), split({"String": "e"}, behavior, invert)
        )
        for behavior in BEHAVIORS
        for invert in (False, True)
    },
    **{
        f"regex-{index}": lambda regex=regex: pre_tokenized(split({"Regex": regex}))
        for index, regex in enumerate(REGEXES)
    },
    "digits": lambda: pre_tokenized({"type": "Digits", "individual_digits": False}),
    "punctuation": lambda: pre_tokenized({"type": "Punctuation", "behavior": "Contiguous"}),
    "whitespace-split": lambda: pre_tokenized({"type": "WhitespaceSplit"}),
    "split-prefix-space": lambda: {
        **pre_tokenized(),
        "pre_tokenizer": sequence(
            "pretokenizers", split(SPACES, "Removed"), byte_level(add_prefix_space=True)
        ),
    },
    "nfkc": lambda: {**json.loads(kind("qwen")), "normalizer": {"type": "NFKC"}},
    "normalizers": lambda: {
        **json.loads(kind("qwen")),
        "normalizer": sequence(
            "normalizers",
            {"type": "Strip", "strip_left": True, "strip_right": True},
            replace({"Regex": r"\p{Nd}+|xx*"}, "#"),
            {"type": "NFKC"},
            replace({"String": "the"}, ""),
        ),
    },
    "no-fallback": lambda: llama2(byte_fallback=False),
    "no-fuse": lambda: llama2(byte_fallback=False, fuse_unk=False),
    "no-unk": lambda: llama2(byte_fallback=False, unk_token=None),
    "some-bytes": without_some_bytes,
    "some-bytes-no-unk": lambda: {
        **(spec := without_some_bytes()),
        "model": {**spec["model"], "unk_token": None},
    },
    "ignore-merges": lambda: llama2(ignore_merges=True),
    "string-merges": lambda: llama2(
        merges=[" ".join(pair) for pair in json.loads(kind("llama2"))["model"]["merges"]]
    ),
    "metaspace-never": lambda: llama2(
        normalizer=None,
        pre_tokenizer=metaspace(prepend_scheme="never", split=True),
        decoder=metaspace(prepend_scheme="never"),
    ),
    "metaspace-first-split": lambda: llama2(
        normalizer=None,
        pre_tokenizer=sequence(
            "pretokenizers",
            {"type": "WhitespaceSplit"},
            metaspace(prepend_scheme="first"),
            {"type": "Digits", "individual_digits": True},
        ),
        decoder=sequence("decoders", {"type": "ByteFallback"}, {"type": "Fuse"}),
    ),
    "metaspace-old": lambda: llama2(
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        decoder=sequence(
            "decoders",
            {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
            {"type": "ByteFallback"},
        ),
    ),
    "decoder-steps": lambda: llama2(
        decoder=sequence(
            "decoders",
            replace({"Regex": "▁+"}, "_"),
            {"type": "Strip", "content": "_", "start": 1, "stop": 0},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": "e", "start": 2, "stop": 0},
        )
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, with_awkward_tokens(VARIANTS[name]()))
    added = added_contents(path)
    texts = generated_texts(NUM_TEXTS // 4, 4, added + SPELLINGS)
    check_encoding(path, [text.encode() for text in texts] + [b"", b" ", b"x"])
    check_decoding(path, random_ids(path, NUM_TEXTS // 4, 5))


def with_normalized_token(spec: dict, content: str, **model: object) -> dict:
    """The same with an added token of the model's vocabulary, looked for in normalized text."""
    vocab = spec["model"]["vocab"]
    token = {"id": vocab.setdefault(content, len(vocab)), "content": content, "normalized": True}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "special"], False)
    added = [one for one in spec["added_tokens"] if one["content"] != content]
    return {
        **spec,
        "added_tokens": [*added, token | flags],
        "model": {**spec["model"], **model},
    }


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("content", ["axb", "x", "the", "<a>", "b c", " x"])
@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen"])
def test_added_tokens_that_the_normalizer_changes(
    name: str, content: str, ignore_merges: bool, tmp_path: Path
) -> None:
    """They decode to their normalized text, whether or not words can be these tokens."""
    changes = [replace({"String": "x"}, "yy"), replace({"String": "th"}, "d")]
    for normalizer in (json.loads(kind(name))["normalizer"], sequence("normalizers", *changes)):
        spec = {**json.loads(kind(name)), "normalizer": normalizer}
        path = write(tmp_path, with_normalized_token(spec, content, ignore_merges=ignore_merges))
        texts = [content, f"1{content}2 {content}{content} b", "the fox axb ayyb", "yy de a"]
        check_decoding(path, check_encoding(path, [text.encode() for text in texts]))


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("content", ["\u212b", "e\u0301x", "café", "cafe\u0301"])
def test_added_tokens_decode_to_the_text_that_they_stand_for(
    content: str, ignore_merges: bool, tmp_path: Path
) -> None:
    """Not by `tokenizers`, which reads them as bytes: see misread_tokens()."""
    spec = with_normalized_token(json.loads(kind("qwen")), content, ignore_merges=ignore_merges)
    path = write(tmp_path, spec)
    text = f"a {content} and {content}"
    (ids,) = check_encoding(path, [text.encode()])
    assert clusterfusion.Tokenizer(path).decode(ids) == unicodedata.normalize("NFC", text)


def test_strip_at_the_end(tmp_path: Path) -> None:
    """Of texts that are not all stripped away, where tokenizers panics."""
    strip = {"type": "Strip", "content": "e", "start": 0, "stop": 2}
    decoder = sequence("decoders", replace({"String": "▁"}, " "), {"type": "Fuse"}, strip)
    path = write(tmp_path, llama2(decoder=decoder))
    ours, reference = clusterfusion.Tokenizer(path), Tokenizer.from_file(str(path))
    for text in ["the", "see", "see  e", "a eee", "eeex", "tree e"]:
        ids = ours.encode(text)
        assert ids == reference_ids(reference, text, True)
        assert ours.decode(ids) == reference.decode(ids)


# --- Unicode, exhaustively ---


CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf"
CLASSES = {
    "categories": [rf"\p{{{name}}}" for name in CATEGORIES.split()],
    "escapes": [r"[\w!]", r"\w", r"[\s!]"],
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_code_point_in_classes(name: str, tmp_path: Path) -> None:
    """Each character is replaced by one, for private use, that stands for its class."""
    replacements = [
        replace({"Regex": regex}, chr(0xE000 + index)) for index, regex in enumerate(CLASSES[name])
    ]
    spec = {**pre_tokenized(), "normalizer": sequence("normalizers", *replacements)}
    check_every_code_point(write(tmp_path, spec), "")


@pytest.mark.parametrize("step", ["Digits", "Punctuation", "WhitespaceSplit"])
def test_every_code_point_in_steps(step: str, tmp_path: Path) -> None:
    options = {"Digits": {"individual_digits": True}, "Punctuation": {"behavior": "Isolated"}}
    # What stands alone is removed, so that ids show it.
    alone = split({"Regex": r"\A[^a]\z"}, "Removed")
    spec = pre_tokenized({"type": step, **options.get(step, {})}, alone)
    check_every_code_point(write(tmp_path, {**spec, "normalizer": None}), "a")


def check_every_code_point(path: Path, between: str) -> None:
    points = code_points()
    texts = ["".join(c + between for c in points[at::4352]) for at in range(4352)]
    check_encoding(path, [text.encode() for text in texts], special=(False,))


def test_nfkc_of_every_code_point(tmp_path: Path) -> None:
    path = write(tmp_path, {**json.loads(kind("qwen")), "normalizer": {"type": "NFKC"}})
    contexts = [
        f"a{c}\u0301" if has_no_meaning(c) else f"a{c}\u0301\u3099か{c}" for c in code_points()
    ]
    texts = ["".join(contexts[at : at + 64]) for at in range(0, len(contexts), 64)]
    texts += [first + second + "ﾞ" for first, second in canonical_pairs()]
    check_encoding(path, [text.encode() for text in texts], special=(False,))


def test_a_hostile_pattern_ends(tmp_path: Path) -> None:
    path = write(tmp_path, pre_tokenized(split({"Regex": "(a+)+$"})))
    with pytest.raises(NotImplementedError, match="takes too long for a text of 41 characters"):
        clusterfusion.Tokenizer(path).encode("a" * 40 + "c")
