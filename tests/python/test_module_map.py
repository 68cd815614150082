"""docs/architecture.md names every folder of the C++ core, and no other."""

from __future__ import annotations

import re

from conftest import ROOT


def test_every_folder_of_src_has_a_line():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Where is what")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(src/[\w/]+)/` \|", table, re.MULTILINE)
    folders = {
        str(path.parent.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*")
        if path.suffix in (".hpp", ".cpp", ".cuh", ".cu")
    }
    assert sorted(named) == sorted(folders)
