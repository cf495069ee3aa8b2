"""The middleware of the server."""

import asyncio
import logging
from typing import Any

import pytest

pytest.importorskip("starlette")

from resnet56.serve.meter import Meter
from resnet56.serve.middleware import ResponseMiddleware


def test_a_path_cannot_forge_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A percent-encoded path can contain any character."""

    async def broken(*_: Any) -> None:
        raise ValueError

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/\x1b[2J\nINFO all is well", "headers": []}
    with caplog.at_level(logging.ERROR):
        asyncio.run(ResponseMiddleware(broken, Meter(), ())(scope, receive, send))
    assert sent[0]["status"] == 500
    assert caplog.messages[0].isprintable()
