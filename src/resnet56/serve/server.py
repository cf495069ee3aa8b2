"""Run the server: listening socket, signals, and stalled connections."""

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from resnet56.errors import UsageError, escape
from resnet56.serve.app import build_app
from resnet56.serve.batching import Predictor
from resnet56.serve.limits import Limits

IDLE_SECONDS = 10.0  # time limit for a connection without a complete request
MAX_CONNECTIONS = 600  # reduced if the process can open only a few files
# File descriptors of the pipes of the decoders, of a new decoder and of the event loop.
RESERVED_FILES = 24
MIN_CONNECTION_FILES = 16
BACKLOG = 128  # maximum number of pending connections
EXIT_SECONDS = 5.0  # grace period after the drain time


class Stopped(BaseException):
    """Raised when a signal stops the server."""


class _Config(uvicorn.Config):
    max_connections = MAX_CONNECTIONS
    announce: Callable[[], None]


class _Server(uvicorn.Server):
    """A server that exits a fixed time after a signal, even if requests are unfinished."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and announce the address once the server accepts requests."""
        await super().startup(sockets)
        if self.started:
            self.config.announce()  # type: ignore[attr-defined]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop the server. The first signal also sets a deadline for the process to exit."""
        if not self.should_exit:
            drain = self.config.timeout_graceful_shutdown or 0
            timer = threading.Timer(drain + EXIT_SECONDS, os._exit, [0])
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)


class Protocol(H11Protocol):
    """HTTP/1.1 protocol that closes stalled connections.

    Uvicorn applies its timeout only between a response and the next request. Without this class, a
    client could keep a connection open forever: by sending headers one byte at a time, by sending
    an endless body after its request is rejected, or by never reading the responses.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch the new connection, or close it if too many connections are open."""
        super().connection_made(transport)
        self.last_cycle: Any = None
        self.last_unread = 0
        self.watchdog = self.loop.call_later(IDLE_SECONDS, self._close_if_stalled)
        if len(self.connections) > self.config.max_connections:  # type: ignore[attr-defined]
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching the connection."""
        self.watchdog.cancel()
        super().connection_lost(exc)

    def _close_if_stalled(self) -> None:
        """Close the connection if it has made no progress since the previous check.

        A connection makes progress if a new request arrives, the server is preparing a response, or
        the client is reading the response.
        """
        unread = self.transport.get_write_buffer_size()
        awaiting_request = self.cycle is None or self.cycle.response_complete
        client_stuck = unread > 0 and unread == self.last_unread
        if self.last_cycle is self.cycle and (awaiting_request or client_stuck):
            self.transport.abort()
        self.last_cycle, self.last_unread = self.cycle, unread
        self.watchdog = self.loop.call_later(IDLE_SECONDS, self._close_if_stalled)


def serve(
    predictor: Predictor,
    host: str,
    port: int,
    say: Callable[[str], None],
    limits: Limits | None = None,
) -> int:
    """Serve a model until Ctrl-C or SIGTERM, then finish the requests in flight and stop.

    Args:
        predictor: the model.
        host: address or host name to listen on.
        port: port to listen on, 0 for any free port.
        say: function that is called with each status line.
        limits: limits on requests and on the time to finish them.

    Returns:
        The exit code: 0 if a signal stopped the server, or 1 if the server failed to start.

    Raises:
        UsageError: the server cannot listen on this address, or the limit on open files is
            too low.
    """
    limits = limits or Limits()
    connections, backlog = _connection_limits()
    listener = listen(host, port)
    address, port = listener.getsockname()[:2]
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    hosts = ("localhost", "127.0.0.1", "::1", host.lower(), address)
    app = build_app(predictor, limits=limits, hosts=hosts if loopback else ("*",))
    config = _Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=backlog,
        timeout_graceful_shutdown=math.ceil(limits.drain_seconds),
    )
    config.max_connections = connections
    server = _Server(config)
    # By default, these loggers log every invalid request.
    for name in ("uvicorn.error", "asyncio", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def announce() -> None:
        url_host = f"[{address}]" if ":" in address else address
        url = f"http://{url_host}:{port}"
        say(f"serving {predictor.name} on {url} (API reference at /docs; press Ctrl-C to stop)")
        if not loopback:
            say("warning: the server is open to the network, without authentication or encryption")

    config.announce = announce
    return _run(server, listener, say)


def _connection_limits() -> tuple[int, int]:
    """Return two limits: the maximum number of open connections, and the size of the backlog.

    Both numbers are reduced if the process can open only a few files (`ulimit -n`). Otherwise,
    asyncio would repeatedly fail to accept a connection and log a traceback each time.

    Raises:
        UsageError: the limit on open files is too low.
    """
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS, BACKLOG
    used = psutil.Process().num_fds() + RESERVED_FILES
    # The server accepts connections above the limit and closes them, so it reserves file
    # descriptors for four times the backlog.
    required = used + MAX_CONNECTIONS + 4 * BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= required:
        return MAX_CONNECTIONS, BACKLOG
    raised = required if hard == resource.RLIM_INFINITY else min(required, hard)
    # macOS rejects some limits that getrlimit reports as allowed.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    available = soft - used
    if available < MIN_CONNECTION_FILES:
        raise UsageError(
            f"the process can open only {soft} files, too few for a server; raise the limit "
            f"(ulimit -n {used + MIN_CONNECTION_FILES} or more)"
        )
    return min(MAX_CONNECTIONS, available // 2), min(BACKLOG, available // 8)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError if the address is not available."""
    if not 0 <= port <= 65535:
        raise UsageError(f"the port must be from 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError:  # A label of the host name is empty or too long.
        raise UsageError(f"{escape(host)} is not a valid host name") from None
    except socket.gaierror as error:
        raise UsageError(f"cannot resolve the host name {host}: {error.strerror}") from None
    except OSError as error:
        # The message also contains the address: "Address already in use (...)".
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}; choose another port"
        ) from None


def _run(server: uvicorn.Server, listener: socket.socket, say: Callable[[str], None]) -> int:
    """Run until a signal arrives.

    Uvicorn handles the signal, finishes the requests in flight, and re-raises the signal.
    """

    def stop(*_: object) -> None:
        raise Stopped

    previous = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    except Stopped:
        say("stopped")
        return 0
    finally:
        listener.close()
        for sig, handler in previous.items():
            signal.signal(sig, handler)
    return 1  # Uvicorn failed to start and has logged the reason.
