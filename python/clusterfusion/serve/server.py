"""The application behind a socket: uvicorn, with limits that survive bad clients."""

from __future__ import annotations

import asyncio
import gc
import re
import resource
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clusterfusion.serve.settings import Settings

_MOST_HEAD_BYTES = 64 << 10
_HEAD_END = b"\r\n\r\n"
_KEEP_ALIVE_SECONDS = 30
# Of each connection, in the kernel, which else takes up to 4 MB for a reader that is slow.
_SEND_BUFFER_BYTES = 256 << 10
_CLOSE = b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_TOO_LARGE_HEAD = b"HTTP/1.1 431 Request Header Fields Too Large" + _CLOSE
# An offer to go on in another protocol, which nobody has to take. httptools does, and drops the
# body behind it: Java's HttpClient makes the offer with each request.
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_DECLINED = b"\r\nx-upgrade:"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout" + _CLOSE


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; running requests have the settings' grace then."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        """Takes what to serve."""
        config = uvicorn.Config(
            app,
            http=_protocol_for(settings),
            loop="uvloop",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            # Requests that are cut at the end of the grace still have to say so.
            timeout_graceful_shutdown=int(settings.grace) + 5,
            ws="none",
        )
        super().__init__(config)
        self._service = app.state.service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_cut = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        _allow_many_sockets()
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is there stays: no need to look at it again and again

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM: the second one ends the grace, a third does not wait."""
        if self.should_exit and not self._is_cut and self._loop is not None:
            self._is_cut = True
            self._loop.call_soon_threadsafe(self._service.cut)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and waits for those that there are."""
        self._service.end_soon()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: The address cannot be had; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind((host, port))
        listener.listen(4096)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"cannot listen on {host} port {port}: {error.strerror}"
        ) from None
    return listener


def _allow_many_sockets() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _protocol_for(settings: Settings) -> type[HttpToolsProtocol]:
    return type("_Protocol", (_LimitedProtocol,), {"settings": settings})


class _LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Ends connections that send too much or too slowly, or that read nothing."""

    settings: Settings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, error: Exception | None) -> None:
        _cancel(self._arrival)
        _cancel(self._stall)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._head_is_next:
            end = (self._head_tail + data).find(_HEAD_END)
            length = len(data) if end < 0 else end + len(_HEAD_END) - len(self._head_tail)
            self._head_tail = (self._head_tail + data)[1 - len(_HEAD_END) :]
            self._head_bytes += length
            if self._head_bytes > _MOST_HEAD_BYTES:
                self._end_with(_TOO_LARGE_HEAD)
                return
            data = _UPGRADE.sub(_DECLINED, data[:length]) + data[length:]
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._expect_request()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_next = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        _cancel(self._arrival)
        self._expect_head()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.settings.stall_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._stall)
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_is_next = True
        self._head_bytes = 0
        self._head_tail = b""

    def _expect_request(self) -> None:
        _cancel(self._arrival)
        self._arrival = self.loop.call_later(self.settings.body_timeout, self._end_with, _TOO_SLOW)

    def _end_with(self, answer: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # no other answer is under way
            self.transport.write(answer)
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
