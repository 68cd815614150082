"""Make the prompts of speculation_texts.py from a novel that the models have not seen.

    python benchmarks/speculation_prompts.py ../shared/data/novels-valid.txt.xz \
        > benchmarks/speculation_texts.json

Kinds: continuation; copying with an edit (a passage, and its beginning again with a word changed);
extracts, a summary by quotation (a passage, then its first sentence and the beginning of another).
"""

from __future__ import annotations

import json
import lzma
import re
import sys

TEXTS_OF_A_KIND = 8
PASSAGE_CHARACTERS = 900


def passages(text: str, count: int) -> list[list[str]]:
    """Runs of whole paragraphs of about PASSAGE_CHARACTERS, from all over the text."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if len(part) > 60]
    found = []
    for number in range(count):
        run: list[str] = []
        for paragraph in paragraphs[number * len(paragraphs) // count :]:
            run.append(paragraph)
            if sum(map(len, run)) >= PASSAGE_CHARACTERS:
                break
        found.append([shortened(part) for part in run])
    return found


def shortened(paragraph: str) -> str:
    """Without what goes beyond the characters of a passage, at the end of a word."""
    if len(paragraph) <= PASSAGE_CHARACTERS:
        return paragraph
    return paragraph[:PASSAGE_CHARACTERS].rsplit(" ", 1)[0]


def sentences(paragraph: str) -> list[str]:
    """Its sentences, with their marks."""
    return re.findall(r"\S.*?[.!?](?=\s|$|\")\"?", paragraph, re.DOTALL) or [paragraph]


def continuation(passage: list[str]) -> str:
    """The passage without its end."""
    whole = "\n\n".join(passage)
    return whole[: len(whole) * 2 // 3].rsplit(" ", 1)[0]


def copy_with_edit(passage: list[str]) -> str:
    """The passage, and its first fifth again in which one word has become another."""
    whole = "\n\n".join(passage)
    begun = whole[: len(whole) // 5].rsplit(" ", 1)[0]
    word = max(re.findall(r"[a-z]+", begun), key=len)
    return f"{whole}\n\n{begun.replace(word, 'window')}"


def extracts(passage: list[str]) -> str:
    """The passage, its first sentence, and the beginning of one from its middle."""
    known = [sentence for paragraph in passage for sentence in sentences(paragraph)]
    middle = known[len(known) // 2]
    begun = " ".join(middle.split()[:3])
    return "\n\n".join(passage) + f"\n\n{known[0]} {begun}"


def main() -> None:
    """Print the prompts as JSON."""
    with lzma.open(sys.argv[1], "rt", encoding="utf-8") as file:
        text = file.read()
    kinds = {
        "continuation": continuation,
        "copying with an edit": copy_with_edit,
        "extracts": extracts,
    }
    parts = iter(passages(text, TEXTS_OF_A_KIND * len(kinds)))
    prompts = [
        {"kind": kind, "prompt": make(next(parts))}
        for _ in range(TEXTS_OF_A_KIND)
        for kind, make in kinds.items()
    ]
    prompts.sort(key=lambda prompt: list(kinds).index(prompt["kind"]))
    print(json.dumps(prompts, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
