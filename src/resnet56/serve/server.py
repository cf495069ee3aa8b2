"""A port, signals, and connections that never finish."""

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

from resnet56.errors import UsageError, shown
from resnet56.serve.app import build_app
from resnet56.serve.batching import Predictor
from resnet56.serve.limits import Limits

IDLE = 10.0  # seconds that a connection may be open without a whole request
CONNECTIONS = 600  # open at once, where the system allows a process as many files
# Files besides connections: pipes of the decoders, those of a replacement, the event loop's.
OTHER_FILES = 24
LEAST_FILES = 16  # for connections
BACKLOG = 128  # connections that wait to be accepted; as many may be accepted at once
END_SECONDS = 5.0  # after the time to drain, until the process ends whatever it does


class Stopped(BaseException):
    """A signal asked to stop."""


class _Config(uvicorn.Config):
    connections = CONNECTIONS
    announce: Callable[[], None]


class _Server(uvicorn.Server):
    """Ends for certain: what is still at work some time after a signal is left behind."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so once requests are answered."""
        await super().startup(sockets)
        if self.started:
            self.config.announce()  # type: ignore[attr-defined]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; on the first signal, set the time at which the process ends anyway."""
        if not self.should_exit:
            drain = self.config.timeout_graceful_shutdown or 0
            last = threading.Timer(drain + END_SECONDS, os._exit, [0])
            last.daemon = True
            last.start()
        super().handle_exit(sig, frame)


class Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on those who open a connection and ask nothing, or read no answer.

    Uvicorn times the silence after an answer only: a client that sends its request's head a
    letter at a time, or a body without end that was refused long ago, would stay for ever; so
    would one that sends request after request and never takes the answers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there."""
        super().connection_made(transport)
        self.asked: Any = None
        self.unread = 0
        self.watch = self.loop.call_later(IDLE, self._look)
        if len(self.connections) > self.config.connections:  # type: ignore[attr-defined]
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self.watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Hang up if, since the last look, nothing was asked and nothing is answered or read."""
        unread = self.transport.get_write_buffer_size()
        waiting = self.cycle is None or self.cycle.response_complete
        stuck = unread > 0 and unread == self.unread
        if self.asked is self.cycle and (waiting or stuck):
            self.transport.abort()
        self.asked, self.unread = self.cycle, unread
        self.watch = self.loop.call_later(IDLE, self._look)


def serve(
    predictor: Predictor,
    host: str,
    port: int,
    say: Callable[[str], None],
    limits: Limits | None = None,
) -> int:
    """Answer until Ctrl-C or SIGTERM; then answer what has begun, for a limited time, and stop.

    Args:
        predictor: the network.
        host: address or name to listen on.
        port: 0 for any free one.
        say: told where it listens and that it stops.
        limits: what a client may ask for.

    Returns:
        The exit code: 0 once it has stopped.

    Raises:
        UsageError: it cannot listen there.
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
    config.connections = connections
    server = _Server(config)
    for name in (
        "uvicorn.error",
        "asyncio",
        "python_multipart",
    ):  # what clients get wrong is no news here
        logging.getLogger(name).setLevel(logging.ERROR)

    def announce() -> None:
        shown = f"[{address}]" if ":" in address else address
        say(f"{predictor.name}: http://{shown}:{port} (the API: /docs; Ctrl-C stops)")
        if not loopback:
            say("anyone who reaches this machine can use it: there is no password or encryption")

    config.announce = announce
    return _run(server, listener, say)


def _connection_limits() -> tuple[int, int]:
    """How many connections may be open, and how many may wait to be accepted.

    Where the system lets the process open few files (`ulimit -n`), fewer than usual: one that
    cannot be accepted would be tried again and again, each time with a traceback in the log.

    Raises:
        UsageError: the process may open too few files.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS, BACKLOG
    used = psutil.Process().num_fds() + OTHER_FILES
    # Connections beyond the limit are accepted before they are closed, some backlogs at a time.
    wanted = used + CONNECTIONS + 4 * BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return CONNECTIONS, BACKLOG
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    room = soft - used
    if room < LEAST_FILES:
        raise UsageError(
            f"the process may open {soft} files, too few for a server; raise the limit "
            f"(ulimit -n {used + LEAST_FILES} or more)"
        )
    return min(CONNECTIONS, room // 2), min(BACKLOG, room // 8)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; UsageError if there can be none."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError:  # a part of it is empty or too long for a name
        raise UsageError(f"--host {shown(host)}: that is no host's name") from None
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        # The system's words come with the address: (98) "Address already in use (...)".
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}; choose another --port"
        ) from None


def _run(server: uvicorn.Server, listener: socket.socket, say: Callable[[str], None]) -> int:
    """Until a signal comes. Uvicorn handles it, drains, then raises it again for us."""

    def stop(*_: object) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    except Stopped:
        say("stopped")
        return 0
    finally:
        listener.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1  # uvicorn gave up by itself, and has said why
