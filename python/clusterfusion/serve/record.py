"""One request's log line."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

LOGGER = logging.getLogger("clusterfusion.serve")


@dataclass
class Record:
    """What is noted of a request on its way; times are seconds since its arrival."""

    id: str
    method: str
    path: str
    client: str
    arrived: float = field(default_factory=time.perf_counter)
    status: int = 0
    stream: bool = False
    sequences: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds_per_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    prompts: list[Any] | None = None
    error: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the request has messages rather than a prompt."""
        return self.path.endswith("/chat/completions")

    def elapsed(self) -> float:
        """Seconds since the request's arrival."""
        return time.perf_counter() - self.arrived

    def log(self, as_json: bool) -> None:
        """Writes the line; what does not apply is left out."""
        line = {
            "id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.elapsed(), 4),
        }
        if self.sequences:
            line |= {
                "stream": self.stream,
                "sequences": self.sequences,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "new_tokens": self.new_tokens,
                "finish_reasons": self.finish_reasons,
            }
        for name in ("queue_seconds", "first_token_seconds", "seconds_per_token"):
            value = getattr(self, name)
            if value is not None:
                line[name] = round(value, 6)
        if self.prompts is not None:
            line["prompts"] = self.prompts
        if self.error is not None:
            line["error"] = self.error
        level = logging.ERROR if self.status == 500 else logging.INFO
        LOGGER.log(level, json.dumps(line) if as_json else _plain(line))


def _plain(line: dict[str, Any]) -> str:
    # What a client has chosen must not look like another line.
    path = quote(line.pop("path"), safe="/%:@!$&'()*+,;=~")
    head = f"{line.pop('client')} {line.pop('method')} {path} {line.pop('status')}"
    return head + "".join(f" {name}={_value(value)}" for name, value in line.items())


def _value(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) and _all_words(value) else json.dumps(value)


def _all_words(value: list[Any]) -> bool:
    return all(isinstance(one, str) and one.isidentifier() for one in value)
