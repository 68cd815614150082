"""Small tokenizers of the kinds that families of models have, trained on this project's texts."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).resolve().parents[2]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def lines() -> list[str]:
    """The texts that tokenizers are trained on."""
    names = ["LICENSE", "README.md", "docs/architecture.md"]
    return [line for name in names for line in (ROOT / name).read_text().splitlines()]


def _trained(tokenizer: Tokenizer, special: list[str], **options: object) -> dict:
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, show_progress=False, **options
    )
    tokenizer.train_from_iterator(lines(), trainer)
    spec = json.loads(tokenizer.to_str())
    # The bytes and the like are no added tokens.
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["content"] not in BYTES]
    return spec


def _template(spec: dict, first: str, more: list[dict] | None = None) -> dict:
    processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, spec["model"]["vocab"][first])]
    )
    own = json.loads(processor.__getstate__())
    spec["post_processor"] = (
        {"type": "Sequence", "processors": [*more, own]} if more is not None else own
    )
    return spec


def _sentencepiece_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _sentencepiece() -> Tokenizer:
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = _sentencepiece_decoder()
    return tokenizer


def llama2() -> dict:
    """Llama 2's: spaces as ▁, put before every text, characters and bytes."""
    tokenizer = _sentencepiece()
    # For training alone: merges do not cross words then.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    spec = _trained(tokenizer, ["<unk>", "<s>", "</s>", *BYTES])
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spec["normalizer"] = json.loads(prepend.__getstate__())
    spec["pre_tokenizer"] = None
    # Llama's have runs of spaces.
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for length in (2, 4, 8):
        half = "▁" * (length // 2)
        if half + half not in vocab:
            vocab[half + half] = len(vocab)
            merges.append([half, half])
    return _template(spec, "<s>")


def mistral() -> dict:
    """Mistral's of version 3: a space before the first text alone."""
    spec = llama2()
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    return spec


def metaspace() -> dict:
    """Words at ▁, decoded by Metaspace."""
    spec = mistral()
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {**spec, "pre_tokenizer": space, "decoder": space}


def _byte_level(splits: list[pre_tokenizers.PreTokenizer], use_regex: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trained_byte_level(tokenizer: Tokenizer, special: list[str]) -> dict:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, special, initial_alphabet=alphabet)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def llama3() -> dict:
    """Llama 3's, with tokens that no merge gives."""
    spec = _trained_byte_level(_byte_level([_split(LLAMA3)]), ["<|begin_of_text|>", "<|eot_id|>"])
    vocab = spec["model"]["vocab"]
    for token in ("Tokenizer", "Ġ1999", "ĠClusterFusion", "123"):
        vocab.setdefault(token, len(vocab))
    spec["model"]["ignore_merges"] = True
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    return _template(spec, "<|begin_of_text|>", [byte_level])


def qwen() -> dict:
    """Qwen 2's and 3's."""
    tokenizer = _byte_level([_split(QWEN)])
    tokenizer.normalizer = normalizers.NFC()
    return _trained_byte_level(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def tekken() -> dict:
    """Mistral's newer ones, and GPT-4o's."""
    return _template(
        _trained_byte_level(_byte_level([_split(TEKKEN)]), ["<unk>", "<s>", "[INST]"]), "<s>"
    )


def smollm2() -> dict:
    """SmolLM2's."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = _byte_level([digits], use_regex=True)
    return _trained_byte_level(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


KINDS: dict[str, Callable[[], dict]] = {
    "llama2": llama2,
    "mistral": mistral,
    "metaspace": metaspace,
    "llama3": llama3,
    "qwen": qwen,
    "tekken": tekken,
    "smollm2": smollm2,
}


def with_awkward_tokens(spec: dict) -> dict:
    """The same with added tokens of all flags."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    flags = [
        {"single_word": True},
        {"lstrip": True},
        {"rstrip": True},
        {"lstrip": True, "rstrip": True, "normalized": False},
        {"normalized": False},
        {"normalized": True},
    ]
    contents = ["<a>", "Word", "<b c>", " x", "<0x41>", "名前"]
    for content, one in zip(contents, flags, strict=True):
        tokenizer.add_tokens([AddedToken(content, **one)])
    tokenizer.add_special_tokens(
        [AddedToken("<|tool|>", lstrip=True), AddedToken("▁s", special=True)]
    )
    return json.loads(tokenizer.to_str())
