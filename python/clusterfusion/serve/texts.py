"""Tokens as the API spells them, and the log-probabilities of texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from clusterfusion import _native
from clusterfusion.engine import Engine
from clusterfusion.serve.feed import TokenScore

# JSON has no infinity; vLLM's number for what cannot be.
_LEAST_LOGPROB = -9999.0


class TokenTexts:
    """Spells tokens. Remembers what it has spelt."""

    def __init__(self, engine: Engine) -> None:
        """Takes the engine's tokenizer, if it has one."""
        self._engine = engine
        self._handle = engine.tokenizer._handle if engine.info.has_tokenizer else None
        self._size = engine.tokenizer.vocab_size if engine.info.has_tokenizer else 0
        self._bytes: dict[int, bytes | None] = {}
        self._texts: dict[int, str] = {}
        self._special: dict[int, bool] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """A token's bytes; None for one that the tokenizer does not know."""
        if token not in self._bytes:
            known = self._handle is not None and 0 <= token < self._size
            self._bytes[token] = (
                bytes(_native.tokenizer_token_bytes(self._handle, token)) if known else None
            )
        return self._bytes[token]

    def text_of(self, token: int) -> str:
        r"""A token's text; ``bytes:\xe2`` for a part of a character, ``token_id:9`` for none."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._spell(token)
        return text

    def _spell(self, token: int) -> str:
        data = self.bytes_of(token)
        if data is None:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def length_of(self, token: int) -> int:
        """How many characters begin in a token."""
        data = self.bytes_of(token) or b""
        return sum(byte & 0xC0 != 0x80 for byte in data)

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts without special tokens."""
        if token not in self._special:
            skipped, shown = (
                self.bytes_of(token)
                and self._engine.tokenizer.decode([token], skip_special_tokens=skips)
                for skips in (True, False)
            )
            self._special[token] = skipped != shown
        return self._special[token]

    def offsets_in_prompt(
        self, tokens: Sequence[int], shown: Sequence[int], text: str
    ) -> list[int]:
        """Where the tokens of a prompt begin in its text.

        Args:
            tokens: All of them.
            shown: Those that stand in the text: all, or all but what the tokenizer puts before and
                behind it.
            text: The text. Some tokenizers put spaces before it and behind special tokens.
        """
        places = range(len(tokens) - len(shown) + 1)
        begin = next((at for at in places if tokens[at : at + len(shown)] == shown), 0)
        offset, offsets = 0, [0] * begin
        for token in shown:
            offsets.append(min(offset, len(text)))
            spelt = self.text_of(token)
            has_own_space = spelt.startswith(" ") and not text.startswith(spelt, offset)
            offset += self.length_of(token) - has_own_space
        return offsets + [len(text)] * (len(tokens) - len(offsets))


class CompletionLogprobs:
    """The object ``logprobs`` of a completion's choice, chunk by chunk."""

    def __init__(self, texts: TokenTexts, top: int, skips_special: bool) -> None:
        """Takes how many of the likeliest tokens are wanted at each place."""
        self._texts = texts
        self._top = top
        self._skips_special = skips_special
        self._prompt_offsets: deque[int] = deque()
        self._offset = 0
        self._text_length = 0

    def begin_with(self, prompt_offsets: Sequence[int], text_length: int) -> None:
        """Puts a prompt's tokens, and its text, before the rest."""
        self._prompt_offsets.extend(prompt_offsets)
        self._offset = text_length

    def chunk(self, scores: Sequence[TokenScore | int], text: str, is_last: bool) -> dict[str, Any]:
        """The object for the next tokens and what the choice's text goes on with.

        A bare token id is one that nothing predicts.
        """
        self._text_length += len(text)
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for score in scores:
            token = score if isinstance(score, int) else score.token
            tokens.append(self._texts.text_of(token))
            offsets.append(self._next_offset(token))
            if isinstance(score, int):
                logprobs.append(None)
                tops.append(None)
            else:
                logprobs.append(finite(score.logprob))
                tops.append(self._likeliest(score))
        if is_last:  # tokens of a stop text may begin behind what is left of the text
            offsets = [min(offset, self._text_length) for offset in offsets]
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _next_offset(self, token: int) -> int:
        if self._prompt_offsets:
            return self._prompt_offsets.popleft()
        offset = self._offset
        if not (self._skips_special and self._texts.is_special(token)):
            self._offset += self._texts.length_of(token)
        return offset

    def _likeliest(self, score: TokenScore) -> dict[str, float]:
        """By text, likeliest first; the token itself is always there, as in the OpenAI API."""
        found: dict[str, float] = {}
        for token, logprob in [*score.top, (score.token, score.logprob)]:
            found.setdefault(self._texts.text_of(token), finite(logprob))
        return found


def chat_logprobs(texts: TokenTexts, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """The object ``logprobs`` of a chat completion's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = texts.bytes_of(token)
        return {
            "token": texts.text_of(token),
            "logprob": finite(logprob),
            "bytes": None if data is None else list(data),
        }

    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*likely) for likely in one.top]}
        for one in scores
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    texts: TokenTexts, scores: Sequence[TokenScore]
) -> list[dict[str, dict[str, Any]] | None]:
    """By token id for each of the prompt's tokens, null for the first, as vLLM has it."""

    def entry(one: TokenScore) -> dict[str, dict[str, Any]]:
        ranked = {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": texts.text_of(token),
            }
            for rank, (token, logprob) in enumerate(one.top, 1)
        }
        own = {
            "logprob": finite(one.logprob),
            "rank": None,
            "decoded_token": texts.text_of(one.token),
        }
        return {str(one.token): own} | ranked

    return [None, *map(entry, scores)]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
