"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clusterfusion import __version__
from clusterfusion.engine import Engine
from clusterfusion.serve.chat import chat_completions
from clusterfusion.serve.chat_template import tokenizer_info
from clusterfusion.serve.completions import completions
from clusterfusion.serve.errors import ApiError, ClientGoneError
from clusterfusion.serve.generation import JsonResponse
from clusterfusion.serve.openapi import document
from clusterfusion.serve.record import Record
from clusterfusion.serve.schema import DetokenizeRequest, TokenizeRequest
from clusterfusion.serve.service import Service, check_vocabulary
from clusterfusion.serve.settings import Settings

_PAGE = Path(__file__).parent / "page"
_OPEN_PATHS = {
    "/",
    "/page-info",
    "/health",
    "/health/live",
    "/metrics",
    "/version",
    "/openapi.json",
}
# What figures are told by: paths that clients make up would be figures without end.
_PATHS = _OPEN_PATHS | {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
}
_CLIENT_GONE = 499  # nginx's status for the log: nobody reads an answer

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def _routes(service: Service) -> list[BaseRoute]:
    def route(path: str, endpoint: Endpoint, method: str) -> Route:
        async def call(request: Request) -> Response:
            return await endpoint(service, request)

        return Route(path, call, methods=[method])

    return [
        route("/v1/completions", completions, "POST"),
        route("/v1/chat/completions", chat_completions, "POST"),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{name:path}", _model, "GET"),
        route("/tokenize", _tokenize, "POST"),
        route("/detokenize", _detokenize, "POST"),
        route("/tokenizer_info", _tokenizer_info, "GET"),
        route("/health", _health, "GET"),
        route("/health/live", _live, "GET"),
        route("/metrics", _metrics, "GET"),
        route("/version", _version, "GET"),
        route("/openapi.json", _openapi, "GET"),
        route("/", _page, "GET"),
        route("/page-info", _page_info, "GET"),
        # A build tree has links to the files.
        Mount("/page", StaticFiles(directory=_PAGE, follow_symlink=True)),
    ]


def build_app(engine: Engine, settings: Settings, max_sequences: int = 256) -> Starlette:
    """Makes the application.

    Args:
        engine: What computes; closing it is the caller's.
        settings: How the server behaves.
        max_sequences: The engine's own limit of texts at once.

    Returns:
        A Starlette application; its ``state.service`` is the :class:`Service`.

    Raises:
        OSError, ValueError: The chat template cannot be read.
    """
    service = Service(engine, settings, max_sequences)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.open()
        try:
            yield
        finally:
            service.close()

    middleware = [Middleware(_Door, service=service)]
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=_routes(service),
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class _Door:
    """What every request passes: its record, its key, and its log line at the end."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [_digest(key) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client = scope.get("client") or ("-",)
        record = Record(_request_id(headers), scope["method"], scope["path"], str(client[0]))
        scope.setdefault("state", {})["record"] = record

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", record.id.encode()),
                ]
            await send(message)

        try:
            if self._may_enter(scope["path"], headers):
                await self._app(scope, receive, noting_send)
            else:
                await _WRONG_KEY.response(scope, receive, noting_send)
        except ClientGoneError:
            record.status = _CLIENT_GONE
        except BaseException as error:
            record.status = 500
            record.error = repr(error)
            raise
        finally:
            self._note(record)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._keys or path in _OPEN_PATHS or path.startswith("/page/"):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        shown = _digest(key.strip())
        # All are compared, so that the time tells nothing.
        found = [hmac.compare_digest(shown, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)

    def _note(self, record: Record) -> None:
        path = record.path if record.path in _PATHS else "other"
        self._service.metrics.note_answer(path, record.status)
        record.log(self._service.settings.log_json)


_WRONG_KEY = ApiError(
    401,
    "no valid API key: send the header 'Authorization: Bearer KEY'",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own, where it is a plain word; else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.record.error = str(error)
    return error.response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    meant = [one for one in (f"/v1{path}", path.removeprefix("/v1")) if one in _PATHS]
    hint = f"did you mean {meant[0]}?" if meant else "/openapi.json tells what there is"
    told = ApiError(
        error.status_code,
        f"{request.method} {path:.200}: {error.detail}; {hint}",
        headers=error.headers,
    )
    return told.response


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal error; the server's log tells more", code="internal").response


async def _models(service: Service, request: Request) -> Response:
    return JsonResponse(
        {"object": "list", "data": [_card(service, name) for name in service.model_names]}
    )


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in service.model_names:
        raise ApiError(
            404, f"the model {name!r:.200} does not exist", param="model", code="model_not_found"
        )
    return JsonResponse(_card(service, name))


_STARTED = int(time.time())


def _card(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "clusterfusion",
        "max_model_len": service.engine.info.max_positions,
    }


async def _tokenize(service: Service, http: Request) -> Response:
    request = await service.read(http, TokenizeRequest)
    tokens = await service.encode(request.prompt, request.add_special_tokens is not False)
    answer = {
        "count": len(tokens),
        "max_model_len": service.engine.info.max_positions,
        "tokens": tokens,
    }
    if request.return_token_strs:
        answer["token_strs"] = [service.texts.text_of(token) for token in tokens]
    return JsonResponse(answer)


async def _detokenize(service: Service, http: Request) -> Response:
    request = await service.read(http, DetokenizeRequest)
    if not service.engine.info.has_tokenizer:
        raise ApiError(400, "the model has no tokenizer", param="tokens")
    config, tokenizer = service.engine.config, service.engine.tokenizer
    check_vocabulary(request.tokens, max(config.vocab_size, tokenizer.vocab_size), "tokens")
    text = tokenizer.decode(request.tokens, skip_special_tokens=bool(request.skip_special_tokens))
    return JsonResponse({"prompt": text})


async def _tokenizer_info(service: Service, request: Request) -> Response:
    """Special tokens and the chat template, as lm-evaluation-harness asks for them."""
    return JsonResponse(tokenizer_info(service.engine, service.chat_template))


async def _health(service: Service, request: Request) -> Response:
    """Ready: takes requests, and the engine computed the last one."""
    if service.is_ending:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    if service.failure is not None:
        raise ApiError(503, f"the engine failed: {service.failure}", code="engine_error")
    return JsonResponse({"status": "ok"})


async def _live(service: Service, request: Request) -> Response:
    return JsonResponse({"status": "ok"})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _version(service: Service, request: Request) -> Response:
    return JsonResponse({"version": __version__})


async def _openapi(service: Service, request: Request) -> Response:
    return JsonResponse(document(__version__))


async def _page(service: Service, request: Request) -> Response:
    return FileResponse(_PAGE / "index.html")


async def _page_info(service: Service, request: Request) -> Response:
    """What the page tells beside the text. The ceiling is measured when it is first asked for."""
    info = service.engine.info
    ceiling = await asyncio.to_thread(service.engine.measure_read_ceiling)
    return JsonResponse(
        {
            "model": service.model_names[0],
            "device": info.device_description,
            "bytes_per_token": info.bytes_per_token,
            "read_ceiling_bytes_per_second": ceiling,
        }
    )
