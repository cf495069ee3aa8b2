"""Middleware: Host and cross-site checks, response headers, metrics, and unhandled exceptions."""

import logging
import re
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resnet56.errors import escape_line
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


class ResponseMiddleware:
    """Adds security headers, records metrics, and catches unhandled exceptions.

    Args:
        app: the wrapped application.
        meter: the metrics to update.
        paths: paths that have their own label in the metrics. All other paths share one label, so a
            client cannot create an unlimited number of labels.
    """

    def __init__(self, app: ASGIApp, meter: Meter, paths: Collection[str]) -> None:
        self.app = app
        self.meter = meter
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
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
        except Exception:  # A bug. Only the log contains the traceback.
            log.exception("%s %s failed", scope["method"], escape_line(scope["path"]))
            if not status:
                detail = "internal server error; see the server log"
                response = JSONResponse({"detail": detail}, 500)
                await response(scope, receive, send_with_headers)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.meter.requests.labels(path, str(status)).inc()
            self.meter.seconds.labels(path).observe(time.perf_counter() - started)


class CrossSiteMiddleware:
    """Rejects requests that browsers send on behalf of pages on other sites.

    A form on any page can upload a file to a server on the visitor's machine. Current browsers
    report the origin of a request in the Sec-Fetch-Site header, and older browsers report it in the
    Origin header. Other clients send neither header. GET requests are allowed because browsers do
    not let other sites read the responses.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            allowed = site in ("same-origin", "none") if site else (
                origin is None or urlsplit(origin).netloc == headers.get("host")
            )  # fmt: skip
            if not allowed:
                response = JSONResponse({"detail": "cross-site requests are not allowed"}, 403)
                return await response(scope, receive, send)
        await self.app(scope, receive, send)


class HostMiddleware:
    """Rejects requests whose Host header does not contain an allowed name.

    Starlette's TrustedHostMiddleware performs the same check, but its error responses are not JSON.

    Args:
        app: the wrapped application.
        names: allowed names in lowercase, without ports or brackets. "*" allows all names.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and "*" not in self.names:
            host = Headers(scope=scope).get("host", "").lower()
            match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?", host)
            if match is None or (match[1] or match[2]) not in self.names:
                response = JSONResponse({"detail": "the Host header is not allowed"}, 400)
                return await response(scope, receive, send)
        await self.app(scope, receive, send)
