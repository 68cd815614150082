"""Each function fits on a screen: 60 lines, its docstring aside.

Python's own parser finds those of Python. In C++ a function is a block outside of others, but for
namespaces and types; what stands before it since the last statement counts too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

LIMIT = 60
PYTHON_FOLDERS = ("benchmarks", "examples", "python", "tests", "tools")
CPP_FOLDERS = ("benchmarks", "examples", "include", "python", "src", "tests")
CPP_SUFFIXES = (".cpp", ".hpp", ".cu", ".cuh")

# What braces may stand in without opening a block; each is replaced by its line breaks.
NO_CODE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*"
    | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+' | ^[ ]*\#(?:\\\n|[^\n])*""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
# What ends a statement or begins or ends a block.
PUNCTUATION = re.compile(r"[{};]")
# A constructor's members, whose values may be in braces, and what then follows.
MEMBERS = re.compile(r"\) (?:noexcept )?: ")
FOLLOWED = re.compile(r"\s*[{,]")
# What stands before a block that is no function: of namespaces and types, which hold functions, and
# values of variables.
NO_FUNCTION = re.compile(
    r"(?:template )?(?:inline )?(?:namespace|struct|class|union|enum|extern)\b[^()]*|.*=", re.DOTALL
)


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Names and lengths."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """What stands before each outermost block, and its length with that."""
    code = NO_CODE.sub(lambda found: "\n" * found[0].count("\n"), text)
    depth = begin = 0  # depth: blocks that are open, of a function; begin: of the statement
    for found in PUNCTUATION.finditer(code):
        if found[0] == "{" and (depth > 0 or is_function(code[begin : found.start()])):
            depth += 1
        elif found[0] == "}" and depth > 0:
            depth -= 1
            if depth == 0:
                block = code[begin : found.end()].strip()
                name = " ".join(block.partition("{")[0].split())
                if MEMBERS.search(name) and FOLLOWED.match(code, found.end()):
                    continue
                yield name, block.count("\n") + 1
        if depth == 0:
            begin = found.end()
    assert depth == 0


def is_function(declaration: str) -> bool:
    """Of what stands before a block outside of others."""
    shorter = re.sub(r"alignas\(.*?\) ", "", " ".join(declaration.split()))
    while shorter != declaration:  # template arguments, from the innermost
        declaration, shorter = shorter, re.sub(r"<[^<>]*> ?", "", shorter)
    return NO_FUNCTION.fullmatch(declaration) is None


def too_long(root: Path) -> dict[str, int]:
    """The functions over the limit, and the lines they take."""
    found = {}
    for folders, suffixes, functions in (
        (PYTHON_FOLDERS, (".py",), python_functions),
        (CPP_FOLDERS, CPP_SUFFIXES, cpp_functions),
    ):
        for folder in folders:
            for path in sorted((root / folder).rglob("*")):
                if path.suffix not in suffixes:
                    continue
                for name, lines in functions(path.read_text(encoding="utf-8")):
                    if lines > LIMIT:
                        found[f"{path.relative_to(root)}: {name}"] = lines
    return found


def test_python_functions_are_found():
    text = """
def one():
    '''Says
    what.'''
    def two(): return 2
class A:
    @decorated
    async def three(self,
                    x): ...
"""
    assert dict(python_functions(text)) == {"one": 2, "two": 1, "three": 2}


def test_cpp_functions_are_found():
    text = r"""
#define OPEN {
namespace a::b {  // }
template <typename T, int kOne = f<T>()>
class alignas(16) A final : public B<int> {
  A(int x)
      : x_{x} {
    if (x == '{') throw "}\"";
  }
  int x_ = 0;
  enum class D : int { one, two };
};
const std::vector<int> kNumbers = {
    1,
};
/* { */
template <typename T>
__global__ void __launch_bounds__(32)
    kernel(const T* x) {
  const auto f = [&] { return R"({)"; };
}
TEST(Suite, Name) {
  for (;;) {
  }
}
}  // namespace a::b
"""
    assert list(cpp_functions(text)) == [
        ("A(int x) : x_", 4),
        ("template <typename T> __global__ void __launch_bounds__(32) kernel(const T* x)", 5),
        ("TEST(Suite, Name)", 4),
    ]


def test_each_function_fits_on_a_screen():
    assert too_long(ROOT) == {}
