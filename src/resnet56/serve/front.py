"""What every request goes through: the check of its host, headers, a count, the last resort."""

import logging
import re
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resnet56.errors import printable
from resnet56.serve.meter import Meter

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

log = logging.getLogger(__name__)


class Front:
    """ASGI middleware around everything else.

    Args:
        app: what it stands in front of.
        meter: counts the answers.
        paths: those counted by name; all others are one, lest a client invent names without end.
    """

    def __init__(self, app: ASGIApp, meter: Meter, paths: Collection[str]) -> None:
        self.app = app
        self.meter = meter
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:  # a bug: its traceback is for the log, not for the client
            log.exception("%s %s failed", scope["method"], printable(scope["path"]))
            if not status:
                problem = JSONResponse({"detail": "the server failed; its log says why"}, 500)
                await problem(scope, receive, send_with_headers)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.meter.requests.labels(path, str(status)).inc()
            self.meter.seconds.labels(path).observe(time.perf_counter() - started)


class CrossSite:
    """ASGI middleware that refuses what a page of another site makes a browser send.

    A form on any page can send a file to a server on the visitor's own machine. Browsers say where
    a request comes from in Sec-Fetch-Site, older ones in Origin; programs send neither. Reading
    is left to the browser, which shows another site no answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            own = site in ("same-origin", "none") if site else (
                origin is None or urlsplit(origin).netloc == headers.get("host")
            )  # fmt: skip
            if not own:
                problem = JSONResponse({"detail": "the request comes from another site"}, 403)
                return await problem(scope, receive, send)
        await self.app(scope, receive, send)


class Hosts:
    """ASGI middleware that answers only those who call the server by one of its names.

    Starlette's own does so, too, but not in the JSON that every other refusal is.

    Args:
        app: what it stands in front of.
        names: without ports and brackets, in lower case; "*" stands for all.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "http" and "*" not in self.names:
            host = Headers(scope=scope).get("host", "").lower()
            found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?", host)
            if found is None or (found[1] or found[2]) not in self.names:
                problem = JSONResponse({"detail": "the Host header names another server"}, 400)
                return await problem(scope, receive, send)
        await self.app(scope, receive, send)
