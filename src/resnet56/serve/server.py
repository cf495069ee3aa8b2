"""A port, signals, and connections that never finish."""

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from resnet56.errors import UsageError, shown
from resnet56.serve.app import build_app
from resnet56.serve.batching import Predictor
from resnet56.serve.limits import Limits

IDLE = 10.0  # seconds that a connection may be open without a whole request
# Open at once: systems commonly allow a process 1,024 files, and the bodies that `Limits` lets it
# hold lie in up to 256 of them.
CONNECTIONS = 600


class Stopped(BaseException):
    """A signal asked to stop."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


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
        if len(self.connections) > CONNECTIONS:
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
    """Answer until Ctrl-C or SIGTERM; then answer what has begun, and stop.

    Args:
        predictor: the network.
        host: address or name to listen on.
        port: 0 for any free one.
        say: told where it listens and that it stops.
        limits: what a client may ask for.

    Returns:
        The exit code that shells give the signal.

    Raises:
        UsageError: it cannot listen there.
    """
    limits = limits or Limits()
    listener = listen(host, port)
    address, port = listener.getsockname()[:2]
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    hosts = ("localhost", "127.0.0.1", "::1", host.lower(), address)
    app = build_app(predictor, limits=limits, hosts=hosts if loopback else ("*",))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # Longer than any request may take, so that none is cut off.
            timeout_graceful_shutdown=round(limits.body_seconds + limits.answer_seconds) + 5,
        )
    )
    for name in (
        "uvicorn.error",
        "asyncio",
        "python_multipart",
    ):  # what clients get wrong is no news here
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = f"[{address}]" if ":" in address else address
    say(f"{predictor.name}: http://{shown}:{port} (the API: /docs; Ctrl-C stops)")
    if not loopback:
        say("whoever reaches this machine can use it: there is no password and no encryption")
    return _run(server, listener, say)


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

    def stop(signum: int, _: FrameType | None) -> None:
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    except Stopped as stopped:
        say("stopped")
        return stopped.exit_code
    finally:
        listener.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1  # uvicorn gave up by itself, and has said why
