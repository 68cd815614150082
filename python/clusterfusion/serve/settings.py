"""What an operator decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How a server behaves; the engine's own options are not among these.

    Attributes:
        model_names: Names that requests may call the model by; the first one is told. Empty for
            the one that the engine was opened by.
        max_waiting: Texts that may wait for a place in the engine; beyond that 429.
        timeout: Seconds that a request may take in all; 0 for any.
        body_timeout: Seconds in which a request's head and body have to arrive.
        stall_timeout: Seconds after which a stream whose reader takes nothing is cut.
        grace: Seconds that running requests have when the server is asked to end.
        max_body_bytes: The largest body of a request.
        api_keys: One of these has to be shown; empty for no keys.
        cors_origins: Origins whose pages may read answers; "*" for all, empty for none.
        strict: Whether fields that are not known are refused rather than logged.
        log_json: Whether log lines are JSON.
        log_prompts: Whether log lines hold prompts.
        chat_template: A file with a Jinja template that takes the place of the model's.
    """

    model_names: Sequence[str] = ()
    max_waiting: int = 2048
    timeout: float = 0.0
    body_timeout: float = 30.0
    stall_timeout: float = 30.0
    grace: float = 30.0
    max_body_bytes: int = 8 << 20
    api_keys: Sequence[str] = field(default=(), repr=False)
    cors_origins: Sequence[str] = ()
    strict: bool = False
    log_json: bool = False
    log_prompts: bool = False
    chat_template: Path | None = None


def read_api_keys(path: Path) -> list[str]:
    """The keys of a file that has one a line; lines that begin with # are comments.

    Raises:
        OSError, ValueError: It cannot be read, or has no key.
    """
    lines = read_text(path).splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} has no key: write one a line")
    return keys


def read_text(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte order mark.

    Raises:
        OSError, ValueError: It cannot be read; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
