"""The examples of docs/serving.md run as they stand there."""

import json
import re
import shutil
import subprocess

import clusterfusion
import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from conftest import ROOT
from serving import serving

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    with serving(demo_model, tmp_path_factory.mktemp("docs")) as server:
        yield server


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs/serving.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def expected(demo_model) -> str:
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1}
    return clusterfusion.Engine(demo_model).generate("It was a dark", **options).text


def test_curl(served, expected):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (block,) = blocks("sh")
    command = block.replace(ADDRESS, served.url)
    output = subprocess.run(
        ["bash", "-ec", command], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    whole, end = json.JSONDecoder().raw_decode(output)
    assert whole["choices"][0]["text"] == expected
    assert output[end:].count("data: ") == 17 and output.endswith("data: [DONE]\n\n")


def test_openai(served, expected, capsys):
    pytest.importorskip("openai", reason="openai is not installed")
    block, _ = blocks("python")
    exec(block.replace(ADDRESS, served.url), {})
    assert capsys.readouterr().out.startswith(expected + "\n")


def test_langchain(served, demo_model, expected, capsys):
    """Three ways to ask: at once, streamed, several prompts with a stop string."""
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    _, block = blocks("python")
    code = block.replace(ADDRESS, served.url).replace("models/demo", str(demo_model))
    exec(code, {})
    engine = clusterfusion.Engine(demo_model)
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 1, "stop": ["."]}  # LangChain's
    several = [one.text for one in engine.generate(["It was a dark", "The old house"], **options)]
    assert capsys.readouterr().out == f"{expected}\n{expected}\n{several}\n"


def test_options_and_paths_are_there(served):
    """What the page names exists, and it leaves out no path."""
    page = (ROOT / "docs/serving.md").read_text()
    help_text = [*served.process.args[0:1], "-m", "clusterfusion.serve", "--help"]
    listed = subprocess.run(help_text, capture_output=True, text=True, check=True).stdout
    for option in set(re.findall(r"`(--[a-z-]+)", page)) - {"--model", "--help", "--free"}:
        assert option in listed, option
    for path in served.client.get("/openapi.json").json()["paths"]:
        assert path.replace("{name}", "NAME") in page, path
