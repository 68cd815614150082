"""What generated parts of Markdown documents are made of."""

from __future__ import annotations

import re
import sys


def replace_part(text: str, begin: str, end: str, content: str) -> str:
    """Put `content` between the comments `begin` and `end`, each on a line of its own."""
    pattern = re.compile(
        rf"(<!-- {re.escape(begin)} -->\n).*?(<!-- {re.escape(end)} -->)", re.DOTALL
    )
    if not pattern.search(text):
        sys.exit(f"no <!-- {begin} --> … <!-- {end} --> in a document that should have it")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def table(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    rows = [f"| {' | '.join(cells)} |\n" for cells in lines]
    return rows[0] + "|---" * len(lines[0]) + "|\n" + "".join(rows[1:])
