"""Awkward texts for tokenizers, the same ones from the same seed."""

# ruff: noqa: RUF001

import random
import unicodedata
from collections.abc import Callable

WORDS = (
    "the of and Tokenizer ClusterFusion naïve Ångström Straße ПРИВЕТ мир 東京 テスト 한국어 שלום"
)
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'RE", "'l", "'r", "''s", "’s"]
SPACES = "\t\n\x0b\x0c\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029"
SPACES += "\u202f\u205f\u2060\u3000\ufeff"
EMOJI = ["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "1️⃣", "❤️", "😀", "🧑🏿‍🚀"]
# Singletons, composition exclusions, Hangul letters and syllables: what NFC changes.
UNNORMALIZED = (
    "\u212b\u2126\u0958\u2adc\ufb1d\uf900\u0344\u0340\u0374\u1100\u1161\u11a8\uac00\u0f43"
)
UNNORMALIZED += "\U0001d15e\U0001109a\U00011935\u0439\u1e9b\u03d4\u0b94\u30ac"
PUNCTUATION = "!\"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'—–…«»“”‘’§°"
NUMBERS = "0123456789²³¼½Ⅷ٣೬𝟘〇一"

MARKS = [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
PLANES = [(plane << 16, (plane << 16) + 0xFFFF) for plane in range(17)]


def code_points() -> list[str]:
    """Every code point that can stand in a text."""
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def has_no_meaning(char: str) -> bool:
    """As seven code points in eight: not assigned, or for private use, so that all are alike."""
    return unicodedata.category(char) in ("Cn", "Co")


def canonical_pairs() -> list[tuple[str, str]]:
    """The pairs of characters that canonical composition joins, without Hangul."""
    pairs = []
    for char in code_points():
        decomposition = unicodedata.decomposition(char)
        parts = [] if decomposition.startswith("<") else decomposition.split()
        if len(parts) == 2:
            pairs.append((chr(int(parts[0], 16)), chr(int(parts[1], 16))))
    return pairs


def _any_code_point(rng: random.Random) -> str:
    first, last = rng.choice(PLANES)
    code = rng.randint(first, last)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"


def _kinds(rng: random.Random, added_tokens: list[str]) -> list[Callable[[], str]]:
    """What makes a piece of each kind."""
    words = WORDS.split()
    joined = ["", *UNNORMALIZED]
    kinds = [
        lambda: rng.choice(words),
        lambda: " " + rng.choice(words),
        lambda: rng.choice(CONTRACTIONS),
        lambda: rng.choice(SPACES) * rng.choice((1, 1, 2, 3)),
        lambda: " " * rng.randint(1, 40),
        lambda: "".join(rng.choices(SPACES, k=rng.randint(1, 6))),
        lambda: "".join(rng.choices(MARKS, k=rng.randint(1, 4))),
        lambda: rng.choice("aeinoszAΩяが한") + "".join(rng.choices(MARKS, k=rng.randint(1, 3))),
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(UNNORMALIZED) + rng.choice(joined),
        lambda: "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 4))),
        lambda: "".join(rng.choices(NUMBERS, k=rng.randint(1, 5))),
        lambda: _any_code_point(rng),
        lambda: chr(rng.randrange(0x20)),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 12))),
    ]
    if added_tokens:
        kinds += [lambda: rng.choice(added_tokens)] * 3
        kinds += [lambda: rng.choice(" \n\u3000") + rng.choice(added_tokens) + rng.choice(" a_é")]
    return kinds


def generated_texts(count: int, seed: int, added_tokens: list[str]) -> list[str]:
    """Texts of one to a dozen pieces, each of another kind."""
    rng = random.Random(seed)
    kinds = _kinds(rng, added_tokens)
    return ["".join([rng.choice(kinds)() for _ in range(rng.randint(1, 12))]) for _ in range(count)]


def _broken(rng: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        change = rng.randrange(4)
        if change == 0:
            data[at:at] = bytes(rng.choices(range(0x80, 0x100), k=rng.randint(1, 4)))
        elif change == 1:
            del data[at : at + 1]
        elif change == 2:
            data[at:at] = rng.choice(
                [
                    b"\xed\xa0\x80",  # a surrogate
                    b"\xc0\xaf",  # too long for its character
                    b"\xf4\x90\x80\x80",  # beyond U+10FFFF
                    b"\xf0\x9f\x98",  # an unfinished character
                    b"\xe0\x80",
                    b"\xfe\xff",
                ]
            )
        else:
            del data[at:]
    return bytes(data)


def generated_bytes(count: int, seed: int, added_tokens: list[str]) -> list[bytes]:
    """Texts whose UTF-8 is broken in one to four places."""
    rng = random.Random(seed)
    texts = generated_texts(count, seed + 1, added_tokens)
    return [_broken(rng, text.encode()) for text in texts]
