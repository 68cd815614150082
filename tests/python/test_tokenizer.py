"""Encoding and decoding against Hugging Face tokenizers, token for token.

CLUSTERFUSION_TOKENIZER_TEXTS says on how many generated texts those that ship are compared.
"""

# ruff: noqa: RUF001

import itertools
import json
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import clusterfusion
import pytest
from tokenizer_texts import (
    canonical_pairs,
    code_points,
    generated_bytes,
    generated_texts,
    has_no_meaning,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
GPT_NEOX = DATA / "gpt-neox-20b-tokenizer.json"
DEMO = ROOT / "models" / "demo" / "tokenizer.json"
WIKITEXT = [DATA / "wikitext-2-valid.txt", DATA / "wikitext-2-test.txt"]
BLOCK_BYTES = 64 * 1024
NUM_TEXTS = int(os.environ.get("CLUSTERFUSION_TOKENIZER_TEXTS", "20000"))


def require_file(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


def reference_ids(reference: Tokenizer, text: str, special: bool) -> list[int] | None:
    """The ids, or None where tokenizers panics (it does when the white space that two added tokens
    take overlaps: "AddedVocabulary bad split").
    """
    try:
        return reference.encode(text, add_special_tokens=special).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


def reference_batch(reference: Tokenizer, texts: list[str], special: bool) -> list:
    try:
        encodings = reference.encode_batch_fast(texts, add_special_tokens=special)
        return [encoding.ids for encoding in encodings]
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return [reference_ids(reference, text, special) for text in texts]


def check_encoding(
    path: Path, texts: list[bytes], special: tuple[bool, ...] = (True, False)
) -> list[list[int]]:
    """Compares the ids of every text, with and without special tokens; returns the last ones."""
    reference = Tokenizer.from_file(str(path))
    ours = clusterfusion.Tokenizer(path)
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    result = []
    for with_special in special:
        expected = reference_batch(reference, decoded, with_special)
        assert expected.count(None) < max(len(texts) / 4, 1)
        result = ours.encode_batch(texts, add_special_tokens=with_special)
        assert len(result) == len(texts)
        for text, found, ids in zip(texts, result, expected, strict=True):
            assert ids is None or found == ids, f"{path.name}, {with_special=}: {text[:500]!r}"
    return result


def texts_of(content: str) -> tuple[str, str]:
    """What an added token may be found as: itself, or normalized."""
    return content, unicodedata.normalize("NFC", content)


def misread_tokens(reference: Tokenizer) -> dict[int, str]:
    """Added tokens like "naïve", which tokenizers reads as bytes of the byte-level alphabet.

    Its issues 1392, 1915, 1996. Here an added token decodes to the text that it was found in,
    unless it is also what merges give.
    """
    size = reference.get_vocab_size(with_added_tokens=False)
    return {
        token: added.content
        for token, added in reference.get_added_tokens_decoder().items()
        if token >= size
        and not added.content.isascii()
        and reference.decode([token], skip_special_tokens=False) not in texts_of(added.content)
    }


def check_decoding(path: Path, lists: list[list[int]]) -> None:
    """Compares the text of every list of ids, with and without special tokens."""
    reference = Tokenizer.from_file(str(path))
    ours = clusterfusion.Tokenizer(path)
    misread = misread_tokens(reference)
    for token, content in misread.items():
        assert ours.decode([token], skip_special_tokens=False) in texts_of(content)
    lists = [[token for token in ids if token not in misread] for ids in lists]
    for skip in (True, False):
        expected = reference.decode_batch(lists, skip_special_tokens=skip)
        found = [ours.decode(ids, skip_special_tokens=skip) for ids in lists]
        for ids, ours_text, text in zip(lists, found, expected, strict=True):
            assert ours_text == text, f"{path.name}, skip={skip}: {ids[:100]}"


def random_ids(path: Path, count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    size = Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True)
    added = list(Tokenizer.from_file(str(path)).get_added_tokens_decoder())
    return [
        [
            rng.choice(added) if added and rng.random() < 0.2 else rng.randrange(size)
            for _ in range(rng.randint(0, 12))
        ]
        for _ in range(count)
    ]


def added_contents(path: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(path))
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


# --- the tokenizers that ship ---


@pytest.mark.parametrize("path", [GPT_NEOX, DEMO], ids=["gpt-neox", "demo"])
class TestShipped:
    @pytest.mark.parametrize("text", WIKITEXT, ids=lambda path: path.stem)
    @pytest.mark.parametrize("cut", ["whole", "lines", "blocks"])
    def test_wikitext(self, path: Path, text: Path, cut: str) -> None:
        data = require_file(text).read_bytes()
        blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
        texts = {"whole": [data], "lines": data.splitlines(keepends=True), "blocks": blocks}[cut]
        special = (True, False) if cut == "whole" else (False,)
        check_decoding(path, check_encoding(require_file(path), texts, special))

    def test_generated_texts(self, path: Path) -> None:
        added = added_contents(require_file(path))
        texts = generated_texts(NUM_TEXTS, 1, added)
        ids = check_encoding(path, [text.encode() for text in texts])
        check_decoding(path, ids[::8])

    def test_broken_utf8(self, path: Path) -> None:
        check_encoding(path, generated_bytes(NUM_TEXTS // 4, 2, added_contents(require_file(path))))

    def test_random_ids(self, path: Path) -> None:
        check_decoding(path, random_ids(require_file(path), NUM_TEXTS // 4, 3))


def test_long_words() -> None:
    texts = [unit * (200_000 // len(unit)) for unit in ("a", "ab", " ", "'", "é", "\u0301", "\n ")]
    texts += ["x" + "\u0301\u0323" * 20_000, "Ⅷ" * 50_000, "the" * 50_000]
    check_encoding(require_file(GPT_NEOX), [text.encode() for text in texts])


# --- small tokenizers with every option ---


def train(initial_alphabet: bool = True) -> dict:
    """A small byte-level BPE as the JSON that tokenizers writes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if initial_alphabet else [],
    )
    tokenizer.train([str(ROOT / "LICENSE")], trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def trained() -> dict:
    return train()


def flagged_tokens() -> list[AddedToken]:
    """One added token for each combination of the five flags, some of them awkward."""
    contents = [
        "word",
        "ab",
        "é",
        "e\u0301",
        " x",
        "  ",
        "<a>",
        "Ġa",
        "naïve",
        "ſ",
        "名前",
        "\u212b",
    ]
    tokens = []
    for index, flags in enumerate(itertools.product([False, True], repeat=4)):
        single_word, lstrip, rstrip, normalized = flags
        for special in (False, True):
            content = f"{contents[index % len(contents)]}{index if index > 11 else ''}"
            tokens.append(
                AddedToken(
                    content + ("!" if special else ""),
                    single_word=single_word,
                    lstrip=lstrip,
                    rstrip=rstrip,
                    normalized=normalized,
                    special=special,
                )
            )
    return tokens


def with_added_tokens(spec: dict, tokens: list[AddedToken]) -> dict:
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    for token in tokens:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return json.loads(tokenizer.to_str())


def byte_level(**settings: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **settings}


def template(pieces: list[str]) -> dict:
    processor = processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=[("<|endoftext|>", 0)]
    )
    return json.loads(processor.__getstate__())


def unreachable_tokens(spec: dict) -> dict:
    """Tokens that no merge gives, but that are whole words of the texts."""
    vocab = spec["model"]["vocab"]
    for token in ("Tokenizer", "Ġthe", "Ġ", "ĠĠĠ", "ClusterFusion", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    return spec


def change_model(spec: dict, **settings: object) -> dict:
    return {**spec, "model": {**spec["model"], **settings}}


Variant = Callable[[dict], dict]
VARIANTS: dict[str, Variant] = {
    "plain": lambda spec: spec,
    "prefix-space": lambda spec: {**spec, "pre_tokenizer": byte_level(add_prefix_space=True)},
    "no-trim": lambda spec: {**spec, "pre_tokenizer": byte_level(trim_offsets=False)},
    "no-regex": lambda spec: {**spec, "pre_tokenizer": byte_level(use_regex=False)},
    "no-regex-prefix-space": lambda spec: {
        **spec,
        "pre_tokenizer": byte_level(use_regex=False, add_prefix_space=True),
    },
    "string-merges": lambda spec: change_model(
        spec, merges=["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    ),
    "no-normalizer": lambda spec: {**spec, "normalizer": None},
    "sequences": lambda spec: {
        **spec,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFC"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level()]},
        "decoder": {"type": "Sequence", "decoders": [byte_level()]},
    },
    "no-processor": lambda spec: {**spec, "post_processor": None},
    "template": lambda spec: {
        **spec,
        "post_processor": template(["<|endoftext|>", "$A", "<|endoftext|>"]),
    },
    "template-twice": lambda spec: {**spec, "post_processor": template(["$A", "$A"])},
    "processor-sequence": lambda spec: {
        **spec,
        "post_processor": {
            "type": "Sequence",
            "processors": [byte_level(), template(["<|endoftext|>", "$A"])],
        },
    },
    "added-tokens": lambda spec: with_added_tokens(spec, flagged_tokens()),
    "added-tokens-prefix-space": lambda spec: with_added_tokens(
        {**spec, "pre_tokenizer": byte_level(add_prefix_space=True)}, flagged_tokens()
    ),
    "added-tokens-no-normalizer": lambda spec: with_added_tokens(
        {**spec, "normalizer": None}, flagged_tokens()
    ),
    "unreachable-tokens": unreachable_tokens,
    "ignore-merges": lambda spec: change_model(unreachable_tokens(spec), ignore_merges=True),
    "unk-token": lambda spec: change_model(spec, unk_token="<|endoftext|>", fuse_unk=True),
    "repeated-merges": lambda spec: change_model(
        spec, merges=spec["model"]["merges"] + spec["model"]["merges"][:40]
    ),
    "reversed-merges": lambda spec: change_model(spec, merges=spec["model"]["merges"][::-1]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, trained: dict, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    spec = VARIANTS[name](json.loads(json.dumps(trained)))
    path.write_text(json.dumps(spec), encoding="utf-8")
    added = added_contents(path)
    check_encoding(path, [text.encode() for text in generated_texts(NUM_TEXTS // 10, 4, added)])
    check_encoding(path, generated_bytes(NUM_TEXTS // 40, 5, added))
    check_encoding(path, [b"", b" ", b"\xff"])
    check_decoding(path, random_ids(path, NUM_TEXTS // 20, 6))


def test_missing_bytes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(train(initial_alphabet=False)), encoding="utf-8")
    check_encoding(path, [text.encode() for text in generated_texts(NUM_TEXTS // 10, 7, [])])


# --- Unicode, exhaustively ---


@pytest.fixture
def bytes_only(trained: dict, tmp_path: Path) -> Path:
    """A tokenizer without merges: its ids show the bytes that splitting and NFC give."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change_model(trained, merges=[])), encoding="utf-8")
    return path


def test_every_code_point(bytes_only: Path) -> None:
    """Word boundaries and NFC beside every code point."""
    contexts = [f"a{c} {c}" if has_no_meaning(c) else f"a{c}1{c} {c}!{c}" for c in code_points()]
    texts = ["".join(contexts[at : at + 64]) for at in range(0, len(contexts), 64)]
    check_encoding(bytes_only, [text.encode() for text in texts], special=(False,))


def test_canonical_composition(bytes_only: Path) -> None:
    marks = ["", "\u0334", "\u0323", "\u0301", "\u0345", "\u200d", "\u1161"]
    texts = [
        first + left + second + right
        for first, second in canonical_pairs()
        for left in marks
        for right in marks
    ]
    check_encoding(bytes_only, [text.encode() for text in texts])
