"""Each type of the C++ core has a name of its own: two of one name break the one-definition rule.

Compilers and linkers need not say so: each file sees but one of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from conftest import ROOT

NAMESPACE = re.compile(r"^namespace ([\w:]*) ?\{")
END = re.compile(r"^\}  // namespace")
# At the margin, where the formatter puts what is in no other type. An explicit specialisation has
# its template's name.
TYPE = re.compile(r"^(?:struct|class|union|enum class|enum) (?:alignas\(.*?\) )?(\w+)(?!::)[ :{]")


def types_of(text: str) -> list[str]:
    """The full names of types that other files can see too."""
    names, namespaces, before = [], [], ""
    for line in text.splitlines():
        if found := NAMESPACE.match(line):
            namespaces.append(found[1])
        elif END.match(line):
            namespaces.pop()
        elif (found := TYPE.match(line)) and "" not in namespaces and ";" not in line.split("{")[0]:
            specialised = re.match(rf".*\b{found[1]}<", line) or before == "template <>"
            if not specialised:
                names.append("::".join([*namespaces, found[1]]))
        before = line
    return names


def places(root: Path) -> dict[str, set[str]]:
    """The files that define each type."""
    found = defaultdict(set)
    for path in sorted(root.rglob("*")):
        if path.suffix in (".hpp", ".cpp", ".h", ".cuh", ".cu"):
            for name in types_of(path.read_text(encoding="utf-8")):
                found[name].add(str(path.relative_to(root)))
    return found


def test_types_are_found():
    text = """
namespace one {
struct A {
};
class Later;
namespace {
struct Hidden {};
}  // namespace
namespace two {
template <>
struct B<int> {};
class C : public A {
};
enum class D : int { x };
}  // namespace two
}  // namespace one
"""
    assert types_of(text) == ["one::A", "one::two::C", "one::two::D"]


def test_each_type_is_defined_once():
    types = places(ROOT / "src") | places(ROOT / "include")
    assert len(types) > 200
    assert {name: files for name, files in types.items() if len(files) > 1} == {}
