"""What all endpoints share: the engine, who may use it, and what is noted of it."""

from __future__ import annotations

import asyncio
import secrets
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from clusterfusion.engine import Engine
from clusterfusion.serve import errors
from clusterfusion.serve.chat_template import ChatTemplate
from clusterfusion.serve.errors import ApiError, ClientGoneError
from clusterfusion.serve.feed import EngineFeed, Event, Result, Submission
from clusterfusion.serve.metrics import Metrics
from clusterfusion.serve.record import LOGGER, Record
from clusterfusion.serve.settings import Settings
from clusterfusion.serve.texts import TokenTexts

RequestT = TypeVar("RequestT", bound=BaseModel)

# By the feed's numbers.
FINISH_REASONS = ("stop", "stop", "length", "length", "abort")

_LONG_TEXT = 1 << 14  # characters; what is longer is encoded beside the event loop
_RETRY_SECONDS = (1, 60)  # the least and the most that a client is told to wait


class Service:
    """One engine behind one event loop."""

    def __init__(self, engine: Engine, settings: Settings, max_sequences: int) -> None:
        """Takes an engine that computes `max_sequences` texts together at most."""
        self.engine = engine
        self.settings = settings
        self.model_names = tuple(settings.model_names) or (engine.info.path,)
        self.texts = TokenTexts(engine)
        self.chat_template = ChatTemplate.find(engine, settings.chat_template)
        self.metrics = Metrics(engine, self.model_names[0])
        self.is_ending = False
        self.failure: str | None = None  # of the engine, until it has computed something again
        self._feed: EngineFeed | None = None
        self._capacity = max_sequences + settings.max_waiting
        self._num_sequences = 0  # that clients wait for
        self._seconds_per_text = 1.0  # between two texts' ends, lately
        self._last_end: float | None = None
        self._jobs: set[Job] = set()

    def open(self) -> None:
        """Begins to work on the running event loop."""
        self._feed = EngineFeed(self.engine)

    def close(self) -> None:
        """Ends what still runs."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def end_soon(self) -> None:
        """Refuses new requests; those that run have their grace, and are cut then."""
        if self.is_ending:
            return
        self.is_ending = True
        loop = asyncio.get_running_loop()
        loop.call_later(self.settings.grace, self.cut)

    def cut(self) -> None:
        """Ends requests that run, with an error."""
        for job in list(self._jobs):
            job.stop(ApiError(503, "the server is shutting down", code="shutting_down"))

    async def read(self, http: Request, kind: type[RequestT]) -> RequestT:
        """Reads and checks a request's body.

        Raises:
            ApiError: It is too long, or not what the endpoint takes.
        """
        if self.is_ending:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        body = await read_body(http, self.settings.max_body_bytes)
        try:
            request = kind.model_validate_json(body.removeprefix(BOM_UTF8))
        except ValidationError as error:
            raise errors.of_validation(error) from None
        unknown = request.unknown_fields()  # type: ignore[attr-defined]
        if unknown and self.settings.strict:
            raise ApiError(
                400, f"fields that are not known: {unknown}", param=unknown[0], code="unknown_field"
            )
        if unknown:
            record: Record = http.state.record
            LOGGER.warning("%s: ignored fields that are not known: %.200s", record.id, unknown)
        self._check_model(getattr(request, "model", None))
        return request

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name!r:.200} does not exist; this server has {self.model_names[0]!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        if not self.engine.info.has_tokenizer:
            raise ApiError(400, "the model has no tokenizer: pass token ids", param="prompt")
        if len(text) < _LONG_TEXT:
            return self.engine.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.engine.encode, text, add_special_tokens=add_special_tokens
        )

    def check_prompt(self, tokens: Sequence[int], max_tokens: int, name: str) -> None:
        """Refuses what the model has no room or no words for."""
        info, vocab_size = self.engine.info, self.engine.config.vocab_size
        longest = info.max_positions - (1 if max_tokens else 0)
        field = name.split("[")[0]
        if not tokens:
            raise ApiError(
                400,
                f"{name} has no tokens, and the model needs one at least to start from",
                param=field,
                code="invalid_value",
            )
        if len(tokens) > longest:
            raise ApiError(
                400,
                f"this model's maximum context length is {info.max_positions} tokens; {name} has "
                f"{len(tokens)}, and {longest} would leave room for "
                f"{'a new one' if max_tokens else 'no new one'}: shorten it",
                param=field,
                code="context_length_exceeded",
            )
        check_vocabulary(tokens, vocab_size, name)

    @asynccontextmanager
    async def job(
        self, http: Request, prompts: list[list[int]], n: int, timeout: float | None, **options: Any
    ) -> AsyncIterator[Job]:
        """Has the engine compute `n` texts behind each prompt while the block runs.

        Args:
            http: Who asks; when it goes, the work ends.
            prompts: Token ids of each.
            n: Samples of each.
            timeout: The request's own, in seconds.
            **options: Those of EngineFeed.start().

        Raises:
            ApiError: There is no place, or the engine refuses.
        """
        assert self._feed is not None, "open() comes first"
        count = len(prompts) * n
        self._check_room(count)
        started = http.state.record.elapsed()
        try:
            submission = self._feed.start(prompts, n, **options)
        except Exception as error:
            raise errors.of_engine(error, http.state.record.is_chat) from None
        job = Job(self, http.state.record, submission, started)
        limits = [seconds for seconds in (timeout, self.settings.timeout) if seconds]
        watcher = asyncio.create_task(job.watch_client(http))
        deadline = _deadline(job, min(limits)) if limits else None
        self._jobs.add(job)
        self._num_sequences += count
        try:
            yield job
        finally:
            self._num_sequences -= count
            self._jobs.discard(job)
            submission.cancel()
            watcher.cancel()
            if deadline is not None:
                deadline.cancel()

    def _check_room(self, count: int) -> None:
        if count > self._capacity:
            raise ApiError(
                400,
                f"the request asks for {count} texts, and the server takes {self._capacity} at once"
                ": ask for fewer",
                param="n",
                code="too_many_texts",
            )
        if self._num_sequences + count <= self._capacity:
            return
        least, most = _RETRY_SECONDS
        seconds = min(max(round(self._seconds_per_text * count), least), most)
        raise ApiError(
            429,
            f"{self._num_sequences} texts are under way or wait, and {self._capacity} is the most: "
            f"try again in {seconds} s",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )

    def note_results(
        self, record: Record, results: Sequence[Result], n: int, started: float
    ) -> None:
        """Counts texts that have ended, and notes them for the log.

        Args:
            record: Their request's.
            results: The texts, samples of each prompt together.
            n: Samples of each.
            started: Seconds from the request's arrival to the engine.
        """
        self.failure = None
        elapsed = record.elapsed()
        record.sequences = len(results)
        record.prompt_tokens = sum(len(one.prompt_tokens) for one in results[::n])
        record.cached_tokens = sum(one.statistics.prefix_hit_tokens for one in results[::n])
        record.new_tokens = sum(len(one.tokens) for one in results)
        record.queue_seconds = max((one.statistics.queue_seconds for one in results), default=None)
        record.finish_reasons = sorted({FINISH_REASONS[one.finish_reason] for one in results})
        firsts, betweens = [], []
        for one in results:
            first = between = None
            if one.tokens:
                first = started + one.statistics.time_to_first_token_seconds
                firsts.append(first)
            if len(one.tokens) > 1:
                between = one.statistics.seconds_per_token
                betweens.append(between)
            reason = FINISH_REASONS[one.finish_reason]
            self.metrics.note_text(one.statistics, reason, first, between)
        record.first_token_seconds = min(firsts, default=None)
        record.seconds_per_token = sum(betweens) / len(betweens) if betweens else None
        self.metrics.note_request(elapsed)
        self._note_rate(record.arrived + elapsed, len(results))

    def _note_rate(self, now: float, count: int) -> None:
        if self._last_end is not None:
            lately = (now - self._last_end) / max(count, 1)
            self._seconds_per_text += 0.1 * (lately - self._seconds_per_text)
        self._last_end = now


class Job:
    """A request that the engine computes."""

    def __init__(
        self, service: Service, record: Record, submission: Submission, started: float
    ) -> None:
        """Service.job() makes these: `started` seconds after the request's arrival."""
        self._service = service
        self._record = record
        self._submission = submission
        self._started = started
        self._stopped: Exception | None = None

    def stop(self, reason: Exception) -> None:
        """Ends the work; whoever waits for it gets `reason`."""
        if self._stopped is None:
            self._stopped = reason
            self._submission.cancel()

    async def watch_client(self, http: Request) -> None:
        """Ends the work when the client is gone."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.stop(ClientGoneError())

    async def bursts(self) -> AsyncIterator[list[Event]]:
        """Yields news until all texts have ended, or stop() was called."""
        with self._told_errors():
            async for burst in self._submission.bursts():
                if self._stopped is not None:
                    return
                yield burst

    async def results(self, n: int) -> list[Result]:
        """Waits for all texts, and notes them; `n` as it was asked for."""
        with self._told_errors():
            results = await self._submission.results()
        self._service.note_results(self._record, results, n, self._started)
        if self._stopped is not None:
            raise self._stopped
        return results

    async def prompt_scores(self, index: int) -> Any:
        """Scores of the prompt of text `index`, from its first event on."""
        return await self._submission.prompt_scores(index)

    @contextmanager
    def _told_errors(self) -> Iterator[None]:
        """Puts errors of the engine into the API's terms, and notes that it failed."""
        try:
            yield
        except Exception as error:
            told = errors.of_engine(error, self._record.is_chat)
            if told.status >= 500:
                self._service.failure = str(error)
                LOGGER.error("the engine failed: %s", error)
            raise told from error


async def read_body(http: Request, limit: int) -> bytes:
    """A request's body.

    Raises:
        ApiError: It has more than `limit` bytes, or is compressed.
        ClientGoneError: It does not come.
    """
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes, which is this server's limit"
    )
    encoding = http.headers.get("content-encoding", "")
    if encoding.lower() not in ("", "identity"):
        raise ApiError(
            415, f"Content-Encoding: expected none, found {encoding!r:.60}: send the body as it is"
        )
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async for part in http.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise ClientGoneError from None
    return b"".join(parts)


def check_vocabulary(tokens: Sequence[int], vocab_size: int, name: str) -> None:
    """Refuses ids that the model does not have."""
    if tokens and max(tokens) >= vocab_size:
        index = next(i for i, token in enumerate(tokens) if token >= vocab_size)
        raise ApiError(
            400,
            f"{name}: expected token ids below {vocab_size} (the model's vocabulary), found "
            f"{tokens[index]} at index {index}",
            param=name.split("[")[0],
            code="invalid_value",
        )


def fresh_seeds(count: int) -> list[int]:
    """Seeds for requests that name none."""
    return [secrets.randbits(62) for _ in range(count)]


def _deadline(job: Job, seconds: float) -> asyncio.TimerHandle:
    error = ApiError(504, f"the request took longer than {seconds:g} s", code="deadline_exceeded")
    return asyncio.get_running_loop().call_later(seconds, job.stop, error)
