"""``clusterfusion chat MODEL``, or ``python -m clusterfusion.chat MODEL``."""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from clusterfusion import Engine
from clusterfusion._command_line import about, add_engine_options, number, open_engine, report

_EXAMPLE = """\
Sampling is as the model's generation_config.json says where no option says otherwise, and greedy
where that says nothing. Standard input may be a pipe: each line is a message, and answers go to
standard output. In a terminal, /help lists the commands.

Exit codes: 0 done; 1 failed (a file, memory, a message that the template refuses, ...); 2 misused
(an option is wrong); 130 ended by Ctrl-C.

Example:
  clusterfusion chat SmolLM2-135M-Instruct --system "You are brief."
  echo "Name a colour." | clusterfusion chat SmolLM2-135M-Instruct --temperature 0
"""


def main(arguments: list[str] | None = None) -> int:
    """Talks until the user ends it.

    Args:
        arguments: The command line behind the program's name; None for the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        install = "python -m pip install 'clusterfusion-lm[chat]'"
        return report(ImportError(f"{error}; chatting needs the extra 'chat': {install}"))
    except (OSError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
        return report(error)


def _run(options: argparse.Namespace) -> int:
    from clusterfusion.chat.console import Console
    from clusterfusion.chat.conversation import Conversation
    from clusterfusion.serve.chat_template import ChatTemplate, tokenizer_info

    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    engine = _engine(options)
    template = ChatTemplate.find(engine, options.chat_template)
    if template is None:
        raise ValueError(
            f"{options.model} has no chat template (chat_template in tokenizer_config.json, or "
            "chat_template.jinja): give one with --chat-template FILE, or use a model that was "
            "trained to chat"
        )
    print(about(engine), file=sys.stderr)
    generate = _generate_options(options)
    end = tokenizer_info(engine, template).get("eos_token")
    end_token = engine.tokenizer.token_to_id(end) if end else None
    if end_token is not None:
        generate["stop_tokens"] = [end_token]
    seed = random.getrandbits(63) if options.seed is None else options.seed
    conversation = Conversation(engine, template, generate, system=options.system, seed=seed)
    if sys.stdin.isatty():
        print("/help lists what can be done; Ctrl-D ends.", file=sys.stderr)
    return Console(conversation, statistics=options.statistics).run()


def _engine(options: argparse.Namespace) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        return open_engine(options)


_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "stop",
)


def _generate_options(options: argparse.Namespace) -> Any:
    given = {name: getattr(options, name) for name in _SAMPLING}
    return {
        "generation_config": True,
        **{name: value for name, value in given.items() if value is not None},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clusterfusion chat",
        description="Talk with a model that has a chat template.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, or name on the hub")
    add("--system", metavar="TEXT", help="the system's message (none)")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template, instead of the model's")
    add("--statistics", action="store_true", help="figures after each answer, on standard error")

    sampling = parser.add_argument_group("answers").add_argument
    sampling("-n", "--max-new-tokens", type=number(int, 1), help="at most (what the context holds)")
    sampling("--temperature", type=number(float, 0), help="0 takes the likeliest token")
    sampling("--top-k", type=number(int, 0), help="keep the k likeliest tokens; 0 for all")
    sampling("--top-p", type=number(float, 0, 1), help="keep the likeliest that together reach it")
    sampling("--min-p", type=number(float, 0, 1), help="drop what is less likely than it x best")
    sampling("--repetition-penalty", type=number(float, 0), help="of tokens seen so far")
    sampling("--frequency-penalty", type=number(float, -2, 2), help="for each time in the answer")
    sampling("--presence-penalty", type=number(float, -2, 2), help="for being in the answer")
    sampling("--no-repeat-ngram-size", type=number(int, 0), help="no so many tokens twice")
    sampling("--seed", type=number(int, 0, 2**64 - 1), help="of the first answer (any)")
    sampling("--stop", action="append", metavar="TEXT", help="ends an answer; may be repeated")

    add_engine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
