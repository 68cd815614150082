"""The examples that README shows build and run as a user would build and run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import clusterfusion
import pytest
from conftest import ROOT

PROMPT = "It was a dark and stormy night"
OPTIONS = {"max_new_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 1}


@pytest.fixture(scope="module")
def expected(demo_model) -> str:
    return clusterfusion.Engine(demo_model).generate(PROMPT, **OPTIONS).text


@pytest.fixture(scope="module")
def prefix(build_dir, tmp_path_factory) -> Path:
    """Where `cmake --install` has put the C++ library."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build_dir, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="module")
def cpp_example(prefix, tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("example")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix_path = f"-DCMAKE_PREFIX_PATH={prefix}"
    run("cmake", "-S", ROOT / "examples/cpp", "-B", build, prefix_path, *generator)
    run("cmake", "--build", build)
    return build / "generate"


def run(
    *command: object, status: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | (environment or {}),
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


def test_python_example(demo_model, expected):
    result = run(sys.executable, ROOT / "examples/python/generate.py", demo_model, PROMPT)
    assert result.stdout == expected
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("name", ["generate.py", "decoder_layer.py"])
def test_examples_say_what_they_take(name):
    """Without arguments: what they want, and no traceback."""
    if name == "decoder_layer.py":
        pytest.importorskip("transformers", reason="transformers is not installed")
    result = run(sys.executable, ROOT / "examples/python" / name, status=2)
    assert f"usage: {name} FOLDER PROMPT" in result.stderr
    assert "Traceback" not in result.stderr


def test_decoder_layer_example_says_that_it_needs_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not here')\n")
    example = ROOT / "examples/python/decoder_layer.py"
    result = run(sys.executable, example, status=1, environment={"PYTHONPATH": str(tmp_path)})
    assert "torch is not here" in result.stderr
    assert "pip install torch transformers" in result.stderr
    assert "Traceback" not in result.stderr


def test_decoder_layer_example(demo_model):
    """One call a layer, with a transformers model's weights, gives what the engine gives."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    expected = clusterfusion.Engine(demo_model).generate(PROMPT, max_new_tokens=51)
    result = run(sys.executable, ROOT / "examples/python/decoder_layer.py", demo_model, PROMPT)
    assert result.stdout == PROMPT + expected.text + "\n"


def test_steering_example(demo_model, tmp_path):
    """Words of the sea become likelier with the scale, and the plot shows it."""
    plot = tmp_path / "steering.svg"
    result = run(sys.executable, ROOT / "examples/python/steering.py", demo_model, plot)
    rows = [line.split() for line in result.stdout.splitlines()[1:10]]
    scales, sea = ([float(row[i].rstrip("%")) for row in rows] for i in (0, 1))
    assert scales == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert sea[2] < sea[4] / 2
    assert sea[6] > sea[4] * 2
    root = ElementTree.parse(plot).getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_steering_example_says_what_it_takes():
    result = run(sys.executable, ROOT / "examples/python/steering.py", status=2)
    assert "usage: steering.py FOLDER [PLOT.svg]" in result.stderr
    assert "Traceback" not in result.stderr


def test_page_about_looking_inside(demo_model, monkeypatch):
    """Its Python runs as it stands there, block after block."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/looking-inside.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


def test_cpp_example(demo_model, expected, cpp_example):
    result = run(cpp_example, demo_model, PROMPT)
    assert result.stdout == expected
    assert "tokens/s" in result.stderr


def test_cpp_example_reports_errors(cpp_example, tmp_path):
    assert "usage" in run(cpp_example, status=2).stderr
    missing = tmp_path / "missing"
    assert str(missing) in run(cpp_example, missing, PROMPT, status=1).stderr


def test_installed_headers_stand_alone(prefix, tmp_path):
    """Each public header compiles by itself, without the project's sources."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    headers = sorted((prefix / "include/clusterfusion").glob("*.hpp"))
    assert [h.name for h in headers] == sorted(
        h.name for h in (ROOT / "include/clusterfusion").glob("*.hpp")
    )
    for header in headers:
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f"#include <clusterfusion/{header.name}>\n")
        flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{prefix}/include"]
        run(compiler, *flags, "-fsyntax-only", source)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("share/bash-completion/completions/clusterfusion", ["completion", "bash"]),
        ("share/zsh/site-functions/_clusterfusion", ["completion", "zsh"]),
        ("share/man/man1/clusterfusion.1", ["man-page"]),
    ],
)
def test_installed_beside_the_program(prefix, file, arguments):
    """Where the shells and man look, and what the program itself prints."""
    assert (prefix / file).read_text() == run(prefix / "bin/clusterfusion", *arguments).stdout
