"""Write src/tokenizer/unicode_table.inc and unicode_categories.inc: Unicode as tokenizers sees it.

tokenizers takes its properties from several sources, each with a Unicode version of its own:
Oniguruma (regular expressions), the crates regex (added tokens), unicode-normalization-alignments
(NFC, NFKC) and unicode_categories (Punctuation), and Rust itself (Digits). This program asks the
Python package about every code point, so that the tables follow what tokenizers does rather than
what any one Unicode version says.

    pip install tokenizers
    python tools/generate_unicode_table.py
"""

import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

FOLDER = Path(__file__).resolve().parent.parent / "src" / "tokenizer"

# Bits of unicode_properties.hpp.
LETTER, NUMBER, SPACE = 1, 2, 3
WORD, NORMALIZATION_SENSITIVE, NORMALIZATION_BASE, COMPATIBILITY = 4, 8, 16, 32
# Bits of unicode_categories.hpp, and its categories in order.
REGEX_WORD, NUMERIC, PUNCTUATION = 32, 64, 128
CATEGORIES = (
    "Cn Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co"
)

LOWEST_CLASS_MARK = "\u0334"  # canonical combining class 1
HIGHEST_CLASS_MARK = "\u0345"  # canonical combining class 240


def code_points() -> list[str]:
    """Every code point that can stand in a text."""
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def regex_class(pre_tokenizer: pre_tokenizers.ByteLevel, char: str) -> int:
    """The class that joins `char` to a run of letters, numbers or other characters, else space."""
    for base, value in (("a", LETTER), ("1", NUMBER), ("!", 0)):
        if len(pre_tokenizer.pre_tokenize_str(base + char)) == 1:
            return value
    return SPACE


def is_word(tokenizer: Tokenizer, char: str) -> bool:
    """Whether a single-word added token is refused beside `char`."""
    return len(tokenizer.encode("#" + char).ids) == 0


def canonical_pairs() -> list[tuple[str, str, str]]:
    """Every (first, second, composite) of canonical composition, Hangul syllables included."""
    pairs = []
    for char in code_points():
        decomposition = unicodedata.decomposition(char)
        if decomposition and not decomposition.startswith("<"):
            parts = [chr(int(part, 16)) for part in decomposition.split()]
            if len(parts) == 2:
                pairs.append((parts[0], parts[1], char))
    for index in range(11172):
        syllable = chr(0xAC00 + index)
        if index % 28 == 0:
            leading, vowel = index // 588, index % 588 // 28
            pairs.append((chr(0x1100 + leading), chr(0x1161 + vowel), syllable))
        else:
            trailing = chr(0x11A7 + index % 28)
            pairs.append((chr(0xAC00 + index - index % 28), trailing, syllable))
    return pairs


def properties() -> dict[str, int]:
    """The property bits of every code point."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    added = Tokenizer(models.BPE())
    added.add_tokens([AddedToken("#", single_word=True, normalized=False)])
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    nfkc = normalizers.NFKC().normalize_str

    bits = {}
    for char in code_points():
        value = regex_class(pre_tokenizer, char)
        if is_word(added, char):
            value |= WORD
        reordered = (
            nfc("!" + char + LOWEST_CLASS_MARK) == "!" + LOWEST_CLASS_MARK + char
            or nfc("!" + HIGHEST_CLASS_MARK + char) == "!" + char + HIGHEST_CLASS_MARK
        )
        if nfc(char) != char or (reordered and char != LOWEST_CLASS_MARK):
            value |= NORMALIZATION_SENSITIVE
        if nfd(char) != char:
            value |= NORMALIZATION_BASE
        if nfkc(char) != nfc(char):
            value |= COMPATIBILITY
        bits[char] = value
    bits[LOWEST_CLASS_MARK] |= NORMALIZATION_SENSITIVE
    for first, second, composite in canonical_pairs():
        if nfc(first + second) == composite:
            bits[first] |= NORMALIZATION_BASE
            bits[second] |= NORMALIZATION_SENSITIVE
    return bits


def ranges(bits: dict[str, int]) -> list[tuple[int, int, int]]:
    """Runs of equal, non-zero properties as (first, last, bits)."""
    runs: list[tuple[int, int, int]] = []
    for char, value in bits.items():
        code = ord(char)
        if runs and runs[-1][1] == code - 1 and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], code, value)
        else:
            runs.append((code, code, value))
    return [run for run in runs if run[2]]


def pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, between: str) -> set[str]:
    """What `pre_tokenizer` gives for all code points, each with `between` behind it."""
    chars = code_points()
    found = set()
    for at in range(0, len(chars), 4096):
        text = "".join(char + between for char in chars[at : at + 4096])
        found.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    return found


def matched(pattern: str) -> set[str]:
    """The code points that a regular expression for one of them matches."""
    pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return {char for piece in pieces(pre_tokenizer, "") for char in piece}


def categories() -> dict[str, int]:
    """General category and properties of every code point for splitting."""
    bits = dict.fromkeys(code_points(), 0)
    for index, category in enumerate(CATEGORIES.split()):
        for char in matched(rf"\p{{{category}}}"):
            bits[char] = index
    for char in matched(r"\w"):
        bits[char] |= REGEX_WORD
    for pre_tokenizer, bit in (
        (pre_tokenizers.Digits(individual_digits=True), NUMERIC),
        (pre_tokenizers.Punctuation("isolated"), PUNCTUATION),
    ):
        for piece in pieces(pre_tokenizer, "a"):
            if len(piece) == 1 and piece != "a":
                bits[piece] |= bit
    return bits


def write(name: str, bits: dict[str, int]) -> None:
    """Write one table."""
    cells = [f"{{0x{first:X}, 0x{last:X}, {value}}}," for first, last, value in ranges(bits)]
    lines, line = [], ""
    for cell in cells:
        if len(line) + 1 + len(cell) > 100:
            lines.append(line)
            line = ""
        line = f"{line} {cell}" if line else cell
    lines.append(line)
    (FOLDER / name).write_text(
        "// Written by tools/generate_unicode_table.py; do not edit.\n"
        f"// As tokenizers {tokenizers.__version__} sees every code point: {{first, last, bits}}.\n"
        + "\n".join(lines)
        + "\n",
        encoding="ascii",
    )


def main() -> None:
    """Write the tables."""
    write("unicode_categories.inc", categories())
    write("unicode_table.inc", properties())


if __name__ == "__main__":
    main()
