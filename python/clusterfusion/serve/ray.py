"""The server on many machines, by Ray Serve: ``serve run clusterfusion.serve.ray:build_app``.

Two deployments. ``Engine`` has replicas, each with an engine and the application of
:mod:`clusterfusion.serve.app`; ``Ingress`` passes requests on to them, and asks another replica
where one is lost before the answer has begun. Needs the extra ``ray``.
"""

# Without postponed annotations: Ray Serve looks at those of build_app().
import asyncio
import inspect
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    WorkerCrashedError,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from clusterfusion import Engine
from clusterfusion.serve import app as single
from clusterfusion.serve.errors import ApiError, ClientGoneError
from clusterfusion.serve.generation import dumps
from clusterfusion.serve.ray_routing import AffinityRouter, affinity_of
from clusterfusion.serve.record import LOGGER
from clusterfusion.serve.service import read_body
from clusterfusion.serve.settings import Settings, read_api_keys

_REPLICA_HEADER = b"x-replica"
_ADDED_BY_RAY = b"x-request-id"  # the same one
_REPLICA_LOST = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError)
_PAUSES = (0.05, 1.0)  # seconds before another replica is tried: the first, and the longest
_INGRESS_REQUESTS = 100_000  # at once in one ingress, which only waits for replicas


class Options(BaseModel):
    """What is deployed. On a command line, objects are written in JSON.

    Attributes:
        model: Checkpoint folder, at the same place on each machine, or name on the hub.
        engine: Arguments of :class:`clusterfusion.Engine`; mode is "throughput" unless told.
        settings: Fields of :class:`Settings`.
        api_key_file: A file with API keys, one a line, on the machine that deploys.
        num_replicas: How many, or "auto".
        autoscaling_config: Ray Serve's, instead of a number.
        max_ongoing_requests: Of each replica; more wait in the ingress. The engine's max_sequences
            unless told.
        max_queued_requests: That may wait in an ingress, -1 for any number; beyond that 429.
        ray_actor_options: Of each replica: {"num_gpus": 1}, {"num_cpus": 8}, ...
        num_ingresses: Replicas of the ingress, each of which takes any number of requests.
        prefix_length: Characters of a prompt by which a replica is chosen for a request that names
            neither session nor user, or four times the token ids; 0 for any replica.
        max_imbalance: Requests that a replica may have more than the least busy one before it is
            passed over.
        retry_seconds: How long a request whose answer has not begun is sent to other replicas.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    api_key_file: Path | None = None
    num_replicas: int | Literal["auto"] | None = None
    autoscaling_config: dict[str, Any] | None = None
    max_ongoing_requests: int | None = Field(None, ge=1)
    max_queued_requests: int = Field(-1, ge=-1)
    ray_actor_options: dict[str, Any] = {}
    num_ingresses: int = Field(1, ge=1)
    prefix_length: int = Field(256, ge=0)
    max_imbalance: int = Field(16, ge=1)
    retry_seconds: float = Field(60, ge=0)

    @field_validator("engine", "settings", "autoscaling_config", "ray_actor_options", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"expected an object in JSON, {error}; found {value!r:.80}") from None

    @model_validator(mode="after")
    def _check_names(self) -> "Options":
        try:
            inspect.signature(Engine).bind(self.model, **self.engine)
            self.make_settings()
        except (TypeError, OSError) as error:
            raise ValueError(str(error)) from None
        return self

    def make_settings(self) -> Settings:
        """The settings of each replica's application."""
        given = {"model_names": [self.model], **self.settings}
        if given.get("chat_template") is not None:
            given["chat_template"] = Path(given["chat_template"])
        if self.api_key_file is not None:
            given["api_keys"] = read_api_keys(self.api_key_file)
        return Settings(**given)

    @property
    def max_sequences(self) -> int:
        """Texts that a replica computes together at most."""
        return int(self.engine.get("max_sequences", 256))


def build_app(options: Options) -> serve.Application:
    """Makes what ``serve run`` and ``serve.run()`` deploy.

    Args:
        options: What, and how many; Ray Serve makes it of the arguments ``name=value`` or of the
            field ``args`` in a config file.
    """
    settings = options.make_settings()
    routing = RequestRouterConfig(
        request_router_class=AffinityRouter,
        request_router_kwargs={"max_imbalance": options.max_imbalance},
    )
    number = {
        "num_replicas": options.num_replicas,
        "autoscaling_config": options.autoscaling_config,
    }
    replicas = serve.deployment(_Replica).options(
        name="Engine",
        max_ongoing_requests=options.max_ongoing_requests or options.max_sequences,
        max_queued_requests=options.max_queued_requests,
        ray_actor_options=options.ray_actor_options,
        request_router_config=routing,
        graceful_shutdown_timeout_s=settings.grace,
        **{name: value for name, value in number.items() if value is not None},
    )
    ingress = serve.deployment(_Ingress).options(
        name="Ingress",
        num_replicas=options.num_ingresses,
        max_ongoing_requests=_INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.grace,
    )
    model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    arguments = {"mode": "throughput", **options.engine}
    bound = replicas.bind(model, arguments, settings, options.max_sequences)
    return ingress.bind(
        bound, settings.max_body_bytes, options.prefix_length, options.retry_seconds
    )


@dataclass(frozen=True)
class Forwarded:
    """A request on its way from the ingress to a replica."""

    scope: dict[str, Any]
    body: bytes
    affinity: str | None


class _Replica:
    """An engine, and the application that answers by it."""

    async def __init__(
        self, model: str, arguments: Mapping[str, Any], settings: Settings, max_sequences: int
    ) -> None:
        self._engine = await asyncio.to_thread(Engine, model, **arguments)
        self._app = single.build_app(self._engine, settings, max_sequences)
        # Entered for good: what ends the replica ends its process.
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self._id = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """Yields the answer's ASGI messages, those that wait together; closing it ends the work."""
        outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        parts: list[Message] = [{"type": "http.request", "body": request.body}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        # The application tells errors itself, in its answers and in its log.
        work = asyncio.ensure_future(self._app(request.scope | {"state": {}}, receive, outbox.put))
        work.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            ended = False
            while not ended:
                messages = [await outbox.get()]
                while not outbox.empty():
                    messages.append(outbox.get_nowait())
                ended = messages[-1] is None
                yield [self._signed(message) for message in messages if message is not None]
        finally:
            gone.set()
            with suppress(Exception):
                await work

    def _signed(self, message: Message) -> Message:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (_REPLICA_HEADER, self._id)]
        return message

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises here again and again."""
        service = self._app.state.service
        if service.failure is not None:
            await asyncio.to_thread(self._engine.generate, [0], max_new_tokens=1)
            service.failure = None


class _Ingress:
    """Passes requests on to replicas."""

    def __init__(
        self, replicas: DeploymentHandle, max_body_bytes: int, prefix_length: int, seconds: float
    ) -> None:
        self._answer = replicas.options(method_name="answer", stream=True)
        self._max_body_bytes = max_body_bytes
        self._prefix_length = prefix_length
        self._retry_seconds = seconds

    async def __call__(self, http: Request) -> Response:
        try:
            body = await read_body(http, self._max_body_bytes)
        except ApiError as error:
            return error.response
        except ClientGoneError:
            return Response(status_code=499)
        names = ("type", "http_version", "method", "scheme", "path", "query_string", "headers")
        scope = {name: http.scope[name] for name in (*names, "client", "server")}
        # Several applications of a cluster have a route prefix each.
        scope["path"] = scope["path"].removeprefix(http.scope.get("root_path", "")) or "/"
        headers = dict(http.headers)
        affinity = affinity_of(headers, body, self._prefix_length) if body else None
        return _Relay(self._answer, Forwarded(scope, body, affinity), self._retry_seconds)


class _Relay(Response):
    """A replica's answer; another one's where that is lost before the answer has begun."""

    def __init__(self, answer: DeploymentHandle, request: Forwarded, retry_seconds: float) -> None:
        super().__init__()
        self._answer = answer
        self._request = request
        self._retry_seconds = retry_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole of it."""
        told = _UNAVAILABLE
        pauses = _pauses(self._retry_seconds)
        while True:
            out = _Out(send)
            try:
                await self._relay(out)
                return
            except _REPLICA_LOST as error:
                LOGGER.warning("a replica was lost: %.300s", error)
                if out.has_begun:
                    await out.end_with(_CUT)
                    return
                pause = next(pauses, None)
                if pause is None:
                    break
                await asyncio.sleep(pause)
            except BackPressureError as error:
                told = ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
                break
            except DeploymentUnavailableError as error:
                LOGGER.error("%s", error)
                break
        await told.response(scope, receive, send)

    async def _relay(self, out: "_Out") -> None:
        call = self._answer.remote(self._request)
        try:
            async for messages in call:
                for message in messages:
                    await out.send(message)
        except BaseException:
            call.cancel()
            raise


class _Out:
    """What goes to the client. The head waits for the body, so that until then all is open."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._is_event_stream = False
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [one for one in message["headers"] if one[0] != _ADDED_BY_RAY]
            self._head = message | {"headers": headers}
            return
        if self._head is not None:
            self.has_begun = True
            kind = dict(self._head["headers"]).get(b"content-type", b"")
            self._is_event_stream = kind.startswith(b"text/event-stream")
            await self._send(self._head)
            self._head = None
        await self._send(message)

    async def end_with(self, error: ApiError) -> None:
        """Ends an answer that has begun: a stream with an event, another by breaking off."""
        if not self._is_event_stream:
            raise error
        body = f"data: {dumps(error.body)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


_CUT = ApiError(
    502,
    "the replica that computed this text was lost in the middle: send the request again",
    code="replica_lost",
)


_UNAVAILABLE = ApiError(
    503,
    "no replica could answer, and the log of the ingress says why: try again later",
    code="replica_lost",
    headers={"Retry-After": "10"},
)


def _pauses(seconds: float) -> Iterator[float]:
    """What to wait after each loss, for that many seconds from the first one on."""
    end = time.monotonic() + seconds
    pause, longest = _PAUSES
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, longest)
