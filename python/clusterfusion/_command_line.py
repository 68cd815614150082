"""What the programs of this package share."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from clusterfusion._native_call import is_of_file
from clusterfusion.engine import Engine

FAILED, MISUSED = 1, 2  # exit codes, as of the C++ program (src/cli/exit_code.hpp)


class MisuseError(ValueError):
    """An option's value is wrong, which only the engine could tell."""


def report(error: Exception) -> int:
    """Prints what went wrong; returns the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return MISUSED if isinstance(error, MisuseError) else FAILED


def about(engine: Engine) -> str:
    """The line that says where a model runs, and why there."""
    info = engine.info
    return f"device: {info.device}, {info.device_description} ({info.device_reason})"


def add_engine_options(parser: argparse.ArgumentParser) -> Any:
    """Adds the options that `open_engine` takes; returns what adds more to the same group."""
    engine = parser.add_argument_group("engine").add_argument
    engine("--revision", help="of a name on the hub (main)")
    engine("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(auto)")
    engine("--threads", type=number(int, 0), default=0, help="CPU threads; 0 for one a core (0)")
    engine(
        "--context",
        type=number(int, 0),
        default=0,
        help="longest context in tokens; 0: the model's (0)",
    )
    engine("--kv-dtype", choices=["float32", "float16", "bfloat16"], help="type of the KV cache")
    engine("--draft", help="who proposes tokens: none, ngram, or a smaller model (none)")
    engine("--draft-tokens", type=number(int, 1), default=8, help="proposed in one step (8)")
    return engine


def open_engine(options: argparse.Namespace, **more: Any) -> Engine:
    """The engine of the model that the options name; `more` are arguments of `Engine`.

    Raises:
        MisuseError: An option is wrong.
        OSError, ValueError, NotImplementedError, MemoryError: A file or the machine is to blame.
    """
    try:
        return Engine(
            options.model,
            options.device,
            threads=options.threads,
            context=options.context,
            kv_dtype=options.kv_dtype,
            draft=options.draft,
            draft_tokens=options.draft_tokens,
            revision=options.revision,
            **more,
        )
    except (ValueError, TypeError, IndexError) as error:
        if is_of_file(error):
            raise
        message = re.sub(
            r"^(\w+)\b",
            lambda word: "--" + word[0].replace("_", "-") if hasattr(options, word[0]) else word[0],
            str(error),
        )
        raise MisuseError(message) from error


def number(kind: type[int] | type[float], least: float, most: float = float("inf")) -> Any:
    """A type of argparse: numbers from `least` to `most`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not least <= value <= most:
            limits = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {limits}, found {text}")
        return value

    parse.__name__ = "integer" if kind is int else "number"
    return parse
