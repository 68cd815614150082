"""A model's chat template: from messages to a prompt, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from clusterfusion.engine import Engine
from clusterfusion.serve.settings import read_text


class TemplateRefusedError(ValueError):
    """The template refuses the messages, or fails on them."""


class ChatTemplate:
    """A Jinja template in a sandbox."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compiles a template.

        Args:
            source: Its text.
            special_tokens: Texts by the names that templates use: bos_token, eos_token, ...

        Raises:
            ValueError: It is not a Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from None
        self.source = source
        self._special_tokens = special_tokens

    @classmethod
    def find(cls, engine: Engine, file: Path | None) -> ChatTemplate | None:
        """The template in `file`, or the model's own; None where there is neither.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not a template, or tokenizer_config.json is not JSON.
        """
        folder = Path(engine.info.path)
        config = _read_json(folder / "tokenizer_config.json")
        source: Any = config.get("chat_template")
        beside = folder / "chat_template.jinja"
        if file is not None:
            source = read_text(file)
        elif beside.is_file():
            source = read_text(beside)
        if isinstance(source, list):
            source = _named_templates(source, folder / "tokenizer_config.json").get("default")
        return cls(source, _special_tokens(config)) if isinstance(source, str) else None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat.

        Args:
            messages: Objects with role and content.
            add_generation_prompt: Whether the beginning of an answer follows.
            continue_final_message: Whether the last message is not ended, so that it goes on.
            variables: Further variables of the template.

        Raises:
            TemplateRefusedError: The template does not take these messages.
        """
        known = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(known)
        except Exception as error:  # a template may do anything
            raise TemplateRefusedError(f"the chat template: {error}") from None
        return _without_end(text, messages) if continue_final_message else text


def tokenizer_info(engine: Engine, template: ChatTemplate | None) -> dict[str, str | None]:
    """Texts of the special tokens that tokenizer_config.json names, and the template."""
    config = _read_json(Path(engine.info.path) / "tokenizer_config.json")
    return {**_special_tokens(config), "chat_template": template.source if template else None}


def _without_end(text: str, messages: Sequence[dict[str, Any]]) -> str:
    # As transformers: white space at the end stays where the template keeps it.
    last = messages[-1].get("content") or ""
    place = text.rfind(last.strip())
    if not last.strip() or place < 0:
        raise TemplateRefusedError("the chat template does not show the last message as it is")
    kept = last.lstrip() if text.startswith(last.lstrip(), place) else last.strip()
    return text[: place + len(kept)]


def _named_templates(templates: list[Any], file: Path) -> dict[str, str]:
    named = {}
    for one in templates:
        parts = (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"{file}: chat_template: expected a text, or a list of objects with the texts "
                f"name and template, found {json.dumps(one)[:100]} in the list"
            )
        named[parts[0]] = parts[1]
    return named


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


class _Generation(Extension):
    """``{% generation %}`` blocks, which mark what a model is trained on: their text as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        """Reads a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
