"""clusterfusion chat: what is typed or piped in, and what the engine alone gives for it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import clusterfusion
import pytest
from test_cli import PROGRAM, TIMEOUT, Terminal

pytest.importorskip("jinja2", reason="the extra 'chat' is not installed")

# Its prompts are easy to write by hand: see prompt_of().
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and message.content == 'no' %}"
    "{{ raise_exception('no such system') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def prompt_of(*messages: tuple[str, str]) -> str:
    said = "".join(f"[{role}] {text}\n" for role, text in messages)
    return f"<|endoftext|>{said}[assistant]"


@pytest.fixture
def folder(demo_model, tmp_path) -> Path:
    """The demo model with a chat template, greedy where nothing else is said."""
    copy = tmp_path / "model"
    shutil.copytree(demo_model, copy)
    edit(copy / "tokenizer_config.json", chat_template=TEMPLATE)
    edit(copy / "generation_config.json", do_sample=False)
    return copy


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def chat(folder: Path, text: str | bytes, *options: str) -> subprocess.CompletedProcess:
    data = text if isinstance(text, bytes) else text.encode()
    command = [sys.executable, "-m", "clusterfusion.chat", str(folder), *options]
    return subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT)


def answers(folder: Path, text: str, *options: str) -> str:
    ended = chat(folder, text, *options)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode()


def alone(engine: clusterfusion.Engine, *messages: tuple[str, str], **options: object) -> str:
    ids = engine.encode(prompt_of(*messages), add_special_tokens=False)
    return engine.generate(ids, **{"max_new_tokens": 20, **options}).text


def test_lines_are_answered_with_the_talk_before_them(folder):
    engine = clusterfusion.Engine(folder)
    first = alone(engine, ("user", "Who is there?"))
    talk = [("user", "Who is there?"), ("assistant", first), ("user", "And then?")]
    second = alone(engine, *talk)
    found = answers(folder, "Who is there?\n\nAnd then?\n", "-n", "20")
    assert found == f"{first}\n{second}\n"


def test_commands(folder):
    engine = clusterfusion.Engine(folder)
    brief, slash = ("system", "Be brief."), ("user", "/x\ny")
    expected = [
        alone(engine, brief, ("user", "One")),
        alone(engine, ("system", "Be long."), ("user", "Two")),
        alone(engine, ("user", "Three")),
        alone(engine, slash),
    ]
    lines = [
        "One",
        "/system Be long.",
        "Two",
        "/system",
        "Three",
        "/reset",
        "//x\\",
        "y",
        "/exit",
        "-",
    ]
    found = answers(folder, "\n".join(lines), "-n", "20", "--system", "Be brief.")
    assert found == "".join(f"{text}\n" for text in expected)


def test_help_and_unknown_commands(folder):
    ended = chat(folder, "/help\n/rest\nHello\n")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert b"/system TEXT" in ended.stderr
    assert b"error: there is no command /rest; /help lists them" in ended.stderr


@pytest.mark.parametrize("command", ["exit", "quit", "help", "reset"])
def test_commands_that_stand_alone(folder, command):
    for line in (f"/{command} extra words", f"/{command}\tx", f"/{command}\\\nx"):
        ended = chat(folder, f"{line}\nHello\n", "-n", "3")
        assert (ended.returncode, ended.stdout) == (1, b"")
        assert f"error: /{command} stands alone, found " in ended.stderr.decode()
    ended = chat(folder, f"/{command} \n/exit\nHello\n", "-n", "3")
    assert (ended.returncode, ended.stdout) == (0, b"")


def test_sampling_is_the_models_unless_options_say_otherwise(folder):
    engine = clusterfusion.Engine(folder)
    ids = engine.encode(prompt_of(("user", "Well?")), add_special_tokens=False)
    # As the file says it, said to the engine one by one.
    own = {"temperature": 0.7, "top_k": 30, "top_p": 0.9}
    edit(folder / "generation_config.json", do_sample=True, **own)
    sampled = engine.generate(ids, max_new_tokens=40, seed=7, **own).text
    assert sampled != engine.generate(ids, max_new_tokens=40).text
    assert answers(folder, "Well?", "-n", "40", "--seed", "7") == sampled + "\n"
    hotter = engine.generate(ids, max_new_tokens=40, seed=7, **{**own, "temperature": 1.5}).text
    options = ("-n", "40", "--seed", "7", "--temperature", "1.5")
    assert answers(folder, "Well?", *options) == hotter + "\n" != sampled + "\n"
    stop = sampled[10:13]
    options = ("-n", "40", "--seed", "7", "--stop", stop)
    assert answers(folder, "Well?", *options) == sampled[: sampled.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("key", "value"), [("repetition_penalty", 0), ("top_p", 0), ("temperature", -1), ("top_k", "5")]
)
def test_a_wrong_generation_config_is_named_by_file_and_key(folder, key, value):
    edit(folder / "generation_config.json", do_sample=True, **{key: value})
    ended = chat(folder, "Well?\n")
    assert (ended.returncode, ended.stdout) == (1, b"")
    expected = f'error: {folder}/generation_config.json: "{key}" must be '
    assert ended.stderr.decode().splitlines()[-1].startswith(expected)


def test_each_of_several_end_tokens_ends_an_answer(folder):
    engine = clusterfusion.Engine(folder)
    ids = engine.encode(prompt_of(("user", "Well?")), add_special_tokens=False)
    tokens = engine.generate(ids, max_new_tokens=30).tokens
    for end in (tokens[4], tokens[9]):
        text = engine.decode(tokens[: tokens.index(end)])
        edit(folder / "generation_config.json", eos_token_id=[0, end, 1])
        assert answers(folder, "Well?", "-n", "30") == text + "\n"
    edit(folder / "generation_config.json", eos_token_id=0)
    piece = clusterfusion.Tokenizer(folder).id_to_token(int(tokens[4]))
    edit(folder / "tokenizer_config.json", eos_token=piece)
    text = engine.decode(tokens[: tokens.index(tokens[4])])
    assert answers(folder, "Well?", "-n", "30") == text + "\n"


def test_the_talk_before_is_in_the_cache(folder):
    question = "It was a cold evening in November, and the old house stood there. " * 8
    ended = chat(folder, f"{question}\nAnd then?\n", "-n", "8", "--statistics")
    hits = [int(count) for count in re.findall(rb"(\d+) of them from the cache", ended.stderr)]
    sizes = [int(count) for count in re.findall(rb"prompt: (\d+) tokens", ended.stderr)]
    assert hits[0] == 0 and hits[1] >= 64 and hits[1] > sizes[0] - 64


def test_without_a_template(demo_model, tmp_path):
    ended = chat(demo_model, "Hello\n")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert b"has no chat template" in ended.stderr and b"--chat-template FILE" in ended.stderr
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    engine = clusterfusion.Engine(demo_model)
    options = ("-n", "20", "--temperature", "0", "--chat-template", str(tmp_path / "chat.jinja"))
    assert answers(demo_model, "Hello\n", *options) == alone(engine, ("user", "Hello")) + "\n"
    ended = chat(demo_model, "Hello\n", "--chat-template", str(tmp_path / "none.jinja"))
    assert ended.returncode == 1 and b"none.jinja" in ended.stderr


def test_what_cannot_be_answered(folder):
    ended = chat(folder, "Hello\n", "--system", "no")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert b"error: the chat template: no such system" in ended.stderr
    ended = chat(folder, "word " * 2000)
    assert ended.returncode == 1
    assert b"/reset begins a new one" in ended.stderr
    assert chat(folder, "x", "--top-p", "1.5").returncode == 2
    ended = chat(folder / "none", "x")
    assert ended.returncode == 1 and b"none" in ended.stderr


def test_wrong_engine_options(folder):
    """2 as the help says, also where the engine is who notices; a broken file is no misuse."""
    for options in (["--context", "999999"], ["--draft-tokens", "16"], ["--draft", ""]):
        ended = chat(folder, "x", *options)
        assert (ended.returncode, ended.stdout) == (2, b"")
        assert ended.stderr.decode().startswith(f"error: {options[0]}")
    (folder / "config.json").write_text("{")
    ended = chat(folder, "x")
    assert ended.returncode == 1 and b"config.json" in ended.stderr


def test_a_context_of_0_is_the_models(folder):
    engine = clusterfusion.Engine(folder, context=0)
    assert engine.info.max_positions == engine.config.max_positions
    text = "It was a dark and stormy night"
    found = engine.perplexity(text, context=0, stride=0)
    assert found.perplexity == engine.perplexity(text).perplexity
    expected = alone(engine, ("user", "Well?")) + "\n"
    assert answers(folder, "Well?", "-n", "20", "--context", "0") == expected


def test_without_jinja_the_extra_is_named(folder):
    code = (
        "import sys; sys.modules['jinja2'] = None; "
        "from clusterfusion.chat.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=TIMEOUT)
    assert ended.returncode == 1
    assert b"pip install 'clusterfusion-lm[chat]'" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_bytes_that_are_no_text(folder):
    engine = clusterfusion.Engine(folder)
    ended = chat(folder, b"caf\xe9\n", "-n", "20")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode() == alone(engine, ("user", "caf\ufffd")) + "\n"


@pytest.mark.skipif(PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN")
def test_in_a_terminal(folder):
    """Typed lines, a cancelled answer, and the end by Ctrl-C where there is no answer."""
    long = str(2**14)
    edit(folder / "config.json", max_position_embeddings=2**15)
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token="")
    edit(folder / "generation_config.json", eos_token_id=None, do_sample=True, temperature=2.0)
    environment = {"CLUSTERFUSION_HUB_PYTHON": sys.executable, "PYTHONPATH": ""}
    terminal = Terminal(
        ["chat", "MODEL", "-n", long, "--seed", "1", "--statistics"], folder, environment
    )
    terminal.wait_for(rb"Ctrl-D ends\.\r\n> $")
    terminal.press(b"Hello\r")
    terminal.wait_for(rb"> Hello\r\n(?s:.{40})")
    terminal.press(b"\x03")
    terminal.wait_for(rb"\(cancelled\), .*\r\n> $")
    terminal.press(b"/help\r")
    terminal.wait_for(rb"/reset .*(\r\n.*)+\r\n> $")
    terminal.press(b"/nothing\r")
    terminal.wait_for(rb"there is no command /nothing.*\r\n> $")
    terminal.interrupt_prompt()
    assert terminal.end() == 130


@pytest.mark.skipif(PROGRAM is None, reason="no program: set CLUSTERFUSION_BIN")
@pytest.mark.parametrize("end", [b"\x04", b"/exit\r"])
def test_the_end_in_a_terminal(folder, end):
    terminal = Terminal(
        ["chat", "MODEL", "-n", "5"],
        folder,
        dict(os.environ) | {"CLUSTERFUSION_HUB_PYTHON": sys.executable},
    )
    terminal.wait_for(rb"> $")
    terminal.press(b"Hello\r")
    terminal.wait_for(rb"Hello\r\n(.|\r\n)+\r\n> $")
    terminal.press(end)
    assert terminal.end() == 0
