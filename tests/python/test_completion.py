"""Completion in bash and zsh, and the manual page: each made from the program's own options."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cli import COMMANDS, PROGRAM, pytestmark, run  # noqa: F401

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff")

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_clusterfusion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    ended = run("completion", "bash")
    assert (ended.code, ended.err) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "clusterfusion"
    path.write_text(ended.out)
    return path


def complete(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", COMPLETE, "bash", script, "clusterfusion", *words],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1] if done.stdout != "\n" else []


def options_in_help(command: str) -> dict[str, str]:
    """Each option of a command by its long name, and what it takes."""
    lines = run(command, "--help").out.splitlines()
    found = [re.match(r"  (?:-\w,)?(--[\w-]+)(?: (\w+)(?:=\S*)?)?(?:  |$)", line) for line in lines]
    return {match[1]: match[2] or "" for match in found if match}


@needs_bash
def test_commands(script):
    assert set(complete(script, "")) == {*COMMANDS, "serve", "chat", "-h", "--help", "--version"}
    assert complete(script, "gen") == ["generate"]
    assert complete(script, "--v") == ["--version"]
    assert complete(script, "nothing") == []


@needs_bash
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command(script, command):
    options = options_in_help(command)
    assert "--help" in options
    assert {o for o in complete(script, command, "-") if o.startswith("--")} == set(options)
    for option, value in options.items():
        assert option in complete(script, command, option[:-1])
        if value in ("N", "TEXT", "IDS", "LIST"):
            assert complete(script, command, option, "") == []


@needs_bash
def test_values(script):
    devices = ["auto", "cpu", "cuda"]
    assert complete(script, "generate", "--device", "") == devices
    assert complete(script, "generate", "--device", "c") == ["cpu", "cuda"]
    assert complete(script, "generate", "--device", "=") == devices
    assert complete(script, "generate", "--device", "=", "a") == ["auto"]
    assert complete(script, "info", "--kv-dtype", "f") == ["float32", "float16"]
    assert complete(script, "perplexity", "--method", "t") == ["transformers-docs"]
    assert complete(script, "generate", "--revision", "m") == []
    assert complete(script, "completion", "") == ["bash", "zsh"]


@needs_bash
def test_files(script, tmp_path):
    (tmp_path / "a model").mkdir()
    (tmp_path / "a text").touch()
    expected = ["a model", "a text"]
    assert sorted(complete(script, "generate", "a", folder=tmp_path)) == expected
    for words in (("generate", "-f"), ("score", "--file"), ("bench", "--timeline")):
        assert sorted(complete(script, *words, "a", folder=tmp_path)) == expected
    assert complete(script, "generate", "--prompt-file", "=", "a t", folder=tmp_path) == ["a text"]


@needs_zsh
def test_zsh_reads_its_script(tmp_path):
    script = tmp_path / "_clusterfusion"
    script.write_text(run("completion", "zsh").out)
    subprocess.run(["zsh", "-n", script], check=True)
    loaded = (
        "fpath=($1); autoload -Uz compinit; compinit -u -d $1/dump; print $_comps[clusterfusion]"
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", loaded, "zsh", tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "_clusterfusion\n" or "compinit" in done.stderr


# Types a line into a zsh of its own, asks for what completes it, and prints what came.
ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "fpath=($1 \$fpath); PS1=; autoload -Uz compinit; compinit -u -d $1/dump"
zpty -w shell "zstyle ':completion:*' list-prompt ''; LISTMAX=0; print re''ady"
zpty -r shell line "*ready*"
zpty -w -n shell "$2"$'\t\t'
sleep 1
zpty -w -n shell $'\x15print do''ne\n'
zpty -r shell line "*done*"
print -r -- $line
"""


@needs_zsh
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("clusterfusion ", [*COMMANDS, "Continue a prompt"]),
        ("clusterfusion generate --device ", ["auto", "cpu", "cuda"]),
        ("clusterfusion generate --te", ["--temperature"]),
        ("clusterfusion generate --p", ["--presence-penalty", "--prompt-file", "--prompt-tokens"]),
        ("clusterfusion perplexity --method=", ["each-token", "transformers-docs"]),
        ("clusterfusion completion ", ["bash", "zsh"]),
    ],
)
def test_zsh_completes(tmp_path, line, offered):
    (tmp_path / "_clusterfusion").write_text(run("completion", "zsh").out)
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", tmp_path, line], capture_output=True, text=True, timeout=60
    )
    assert all(word in done.stdout for word in offered), done.stdout


@needs_groff
def test_manual_page_is_well_formed_and_complete():
    page = run("man-page")
    assert (page.code, page.err) == (0, "")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou"],
        input=page.out,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    text = done.stdout
    assert text.startswith("CLUSTERFUSION(1)")
    for command in COMMANDS:
        assert re.search(rf"^{command}$", text, re.MULTILINE)
        for option in options_in_help(command):
            assert option in text
    assert r"a newline in bash: $'\n'" in re.sub(r"\s+", " ", text)


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man")
def test_man_shows_it(tmp_path):
    page = tmp_path / "clusterfusion.1"
    page.write_text(run("man-page").out)
    done = subprocess.run(["man", "--local-file", page], capture_output=True, text=True)
    if "minimized" in done.stdout:
        pytest.skip("this system has a man that shows nothing")
    assert done.returncode == 0 and "clusterfusion generate" in done.stdout


def test_manual_page_is_no_command_of_the_help():
    assert "man-page" not in run("--help").out
    assert "man-page" not in run("mann-page").err
    assert PROGRAM is not None
