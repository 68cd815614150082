"""A talk between a user and a model, as messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from clusterfusion.engine import Engine, GenerateOptions
from clusterfusion.results import Generation
from clusterfusion.serve.chat_template import ChatTemplate


class Conversation:
    """Messages so far. One engine answers all, so that what was said before is in its cache."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        options: GenerateOptions,
        *,
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        """Begins without messages.

        Args:
            engine: Answers.
            template: Makes its prompts.
            options: Of each answer; without max_new_tokens it may take what is left of the context.
            system: The first message, if any.
            seed: Of the first answer; each that follows has the next.
        """
        self._engine = engine
        self._template = template
        self._options = options
        self._seeds = itertools.count(seed)
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None
        self.reset(system)

    @property
    def system(self) -> str | None:
        """The first message, of the role system."""
        return self._system

    def reset(self, system: str | None) -> None:
        """Forgets all that was said, and begins with another system message, or with none."""
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last = None

    def answer(self, text: str) -> Iterator[str]:
        """Says something, and gives the answer in pieces as it comes.

        An iteration that ends early, as by KeyboardInterrupt, ends the answer; what has come of it
        stays in the talk. Without any of it the question is forgotten as well.

        Raises:
            TemplateRefusedError: The template does not take this message.
            ValueError: The talk does not fit into the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.render(asked, add_generation_prompt=True)
        # A template writes the special tokens that it wants.
        tokens = self._engine.encode(prompt, add_special_tokens=False)
        room = self._engine.info.max_positions - len(tokens)
        if room < 1:
            raise ValueError(
                f"the talk has {len(tokens)} tokens, and the context {len(tokens) + room}: "
                "/reset begins a new one"
            )
        options: dict[str, Any] = {"seed": next(self._seeds), "max_new_tokens": room}
        options |= self._options
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        pieces: list[str] = []
        with self._engine.stream(tokens, **options) as stream:
            try:
                for event in stream:
                    pieces.append(event.text)
                    yield event.text
            finally:
                said = "".join(pieces)
                if said:
                    self.messages = [*asked, {"role": "assistant", "content": said}]
                stream.close()
                (self.last,) = stream.results
