"""The engine's news on the event loop: one crossing for a burst of all requests."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from clusterfusion import _native
from clusterfusion.engine import Engine, _requests
from clusterfusion.results import Statistics

# By the library's numbers (FinishReason in engine.hpp).
STOP_TOKEN, STOP_STRING, TOKEN_LIMIT, CONTEXT_LIMIT, CANCELLED = range(5)

# A stream that nobody reads keeps this many events apart; more are joined.
_MOST_SEPARATE = 256


class TokenScores:
    """Log-probabilities of tokens, kept as arrays until somebody reads them."""

    def __init__(self, columns: Any) -> None:
        """Takes columns as python/src/feed.cpp makes them."""
        self._columns = [np.from_dlpack(column) for column in columns]

    def read(self, begin: int = 0, end: int | None = None) -> list[TokenScore]:
        """Those of tokens `begin` to `end`."""
        tokens, logprobs, ends, top_tokens, top_logprobs = self._columns
        bounds = [int(ends[begin - 1]) if begin else 0, *ends[begin:end].tolist()]
        first = bounds[0]
        top = list(
            zip(
                top_tokens[first : bounds[-1]].tolist(),
                top_logprobs[first : bounds[-1]].tolist(),
                strict=True,
            )
        )
        rows = zip(
            tokens[begin:end].tolist(), logprobs[begin:end].tolist(), pairwise(bounds), strict=True
        )
        return [
            TokenScore(token, logprob, top[low - first : high - first])
            for token, logprob, (low, high) in rows
        ]


class TokenScore(NamedTuple):
    """A token's log-probability, and the likeliest tokens at its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Event(NamedTuple):
    """News of one text.

    Attributes:
        index: Which text: sample s of prompt p has p * n + s.
        text: What is new of it.
        tokens: New tokens.
        finish_reason: One of the numbers above in the text's last event, else None.
        scores: Of the tokens, if they were asked for: these, and from which row on.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: int | None
    scores: tuple[TokenScores, int] | None

    def read_scores(self) -> list[TokenScore]:
        """The tokens' scores; empty if they were not asked for."""
        if self.scores is None:
            return []
        scores, row = self.scores
        return scores.read(row, row + len(self.tokens))


@dataclass(frozen=True)
class Result:
    """A text that has ended."""

    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    scores: TokenScores
    prompt_scores: TokenScores
    finish_reason: int
    statistics: Statistics


class Submission:
    """What the engine computes for one request. Belongs to the event loop."""

    def __init__(self, feed: EngineFeed, key: int, wants_scores: bool, keeps_apart: bool) -> None:
        """EngineFeed.start() makes these."""
        self._feed = feed
        self._key = key
        self._wants_scores = wants_scores
        self._keeps_apart = keeps_apart
        self._events: list[Event] = []
        self._results: list[Result] | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def bursts(self) -> AsyncIterator[list[Event]]:
        """Yields what has come since the last time, until all texts have ended.

        Raises:
            Exception: What the engine raised, in its class.
        """
        while True:
            while not self._events and self._results is None and self._error is None:
                await self._news()
            if self._events:
                events, self._events = self._events, []
                yield events
            elif self._error is not None:
                raise self._error
            else:
                return

    async def results(self) -> list[Result]:
        """Waits for the end. Raises what the engine raised, in its class."""
        while self._results is None and self._error is None:
            await self._news()
        if self._error is not None:
            raise self._error
        assert self._results is not None
        return self._results

    async def prompt_scores(self, index: int) -> list[TokenScore]:
        """Scores of a text's prompt, all there from the text's first event on."""
        if self._results is not None:
            return self._results[index].prompt_scores.read()
        found = _native.feed_prompt_scores(self._feed._handle, self._key, index)
        return TokenScores(found).read()

    def cancel(self) -> None:
        """Ends all texts within a burst; their ends come as usual. Harmless when they have."""
        if self._results is None and self._error is None:
            _native.feed_cancel(self._feed._handle, self._key)

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _add(self, event: Event) -> None:
        self._events.append(event)
        if len(self._events) > _MOST_SEPARATE and not self._keeps_apart:
            self._events = _joined(self._events)

    def _end(self, results: list[Result] | None, error: Exception | None) -> None:
        self._results, self._error = results, error
        self._wake()


class EngineFeed:
    """Starts requests and brings their news to the running event loop."""

    def __init__(self, engine: Engine) -> None:
        """Must be called where the loop runs, and closed there."""
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handle = _native.feed_open(engine._handle, self._descriptor)
        self._submissions: dict[int, Submission] = {}
        self._loop.add_reader(self._descriptor, self._take)

    def start(
        self,
        prompts: Sequence[list[int]],
        n: int,
        *,
        streams: bool,
        keeps_apart: bool,
        **options: Any,
    ) -> Submission:
        """Hands prompts to the engine.

        Args:
            prompts: Token ids of each prompt.
            n: Samples of each.
            streams: Whether events are wanted; else results are all.
            keeps_apart: Whether each token needs an event of its own, also where nobody reads.
            **options: Those of Engine.generate().

        Raises:
            ValueError, TypeError, IndexError, MemoryError: As Engine.stream() does.
        """
        fields = [
            {"prompt": b"", "prompt_tokens": np.array(prompt, dtype=np.int32)} for prompt in prompts
        ]
        requests = [{**one, "n": n} for one in _requests(fields, options, dict)]  # type: ignore
        key = _native.feed_start(self._handle, requests, streams)
        wants_scores = options.get("logprobs") is not None
        submission = Submission(self, key, wants_scores, keeps_apart or wants_scores)
        self._submissions[key] = submission
        return submission

    def close(self) -> None:
        """Cancels what runs, and waits until it is gone."""
        self._loop.remove_reader(self._descriptor)
        self._handle = None
        os.close(self._descriptor)

    def _take(self) -> None:
        os.eventfd_read(self._descriptor)
        events, ends = _native.feed_take(self._handle)
        self._hand_out_events(*events)
        for key, error, results in ends:
            submission = self._submissions.pop(key)
            if error is None:
                submission._end([_result(fields) for fields in results], None)
            else:
                kind, message = map(str, error)
                submission._end(None, getattr(builtins, kind, RuntimeError)(message))

    def _hand_out_events(
        self, keys: Any, indices: Any, reasons: Any, text_ends: Any, texts: Any, tokens: Any
    ) -> None:
        key_list = _list(keys)
        if not key_list:
            return
        all_texts = bytes(texts)
        token_list = _list(tokens[0])
        scores = TokenScores(tokens)
        begin = 0
        woken = set()
        rows = zip(key_list, _list(indices), _list(reasons), _list(text_ends), strict=True)
        for row, (key, index, reason, end) in enumerate(rows):
            submission = self._submissions[key]
            token = token_list[row]
            submission._add(
                Event(
                    index,
                    all_texts[begin:end].decode(),
                    [token] if token >= 0 else [],
                    reason if reason >= 0 else None,
                    (scores, row) if submission._wants_scores else None,
                )
            )
            begin = end
            woken.add(submission)
        for submission in woken:
            submission._wake()


def _list(column: Any) -> list[Any]:
    values: list[Any] = np.from_dlpack(column).tolist()
    return values


def _result(fields: Any) -> Result:
    return Result(
        text=str(fields["text"]),
        prompt_tokens=_list(fields["prompt_tokens"]),
        tokens=_list(fields["tokens"]),
        scores=TokenScores(fields["sampled"]),
        prompt_scores=TokenScores(fields["prompt_scores"]),
        finish_reason=fields["finish_reason"],
        statistics=Statistics(**fields["statistics"]),
    )


def _joined(events: list[Event]) -> list[Event]:
    """One event for each text, in the order of their first ones."""
    by_index: dict[int, list[Event]] = {}
    for event in events:
        by_index.setdefault(event.index, []).append(event)
    return [
        Event(index, "".join(one.text for one in some), [], some[-1].finish_reason, None)
        for index, some in by_index.items()
    ]
