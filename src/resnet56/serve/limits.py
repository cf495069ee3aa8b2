"""Limits on client requests. A request that exceeds a limit receives a 4xx response."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException

from resnet56.data.images import BROWSER_FORMATS


@dataclass(frozen=True)
class Limits:
    """Limits that protect the server, well above the requirements of normal requests."""

    images: int = 32  # maximum number per request
    pixels: int = 25_000_000  # maximum per image. Phone cameras produce fewer pixels by default.
    body_bytes: int = 16 * 2**20  # maximum per request
    body_seconds: float = 30.0  # time to receive the body
    answer_seconds: float = 30.0  # time from the end of the body to the response
    requests: int = 128  # number of requests in flight
    buffered_bytes: int = 256 * 2**20  # total size of the bodies of all requests in flight
    formats: tuple[str, ...] = BROWSER_FORMATS  # accepted image formats, as Pillow names them
    decoders: int = 2  # number of decoding processes
    decode_seconds: float = 6.0  # time per image. The slowest ordinary images take about 1 s.
    decode_bytes: int = 768 * 2**20  # memory per image. The largest ordinary images take 400 MiB.
    stall_seconds: float = 10.0  # time without progress on waiting requests before /healthz fails
    drain_seconds: float = 30.0  # time to finish the requests in flight on shutdown


def too_busy() -> HTTPException:
    """Return the 429 error for a server at capacity."""
    return HTTPException(
        429, "too many requests in flight; retry in a second", {"Retry-After": "1"}
    )


class RequestLimiter:
    """Limits the number of requests in flight and their buffered bytes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = self.buffered_bytes = 0

    @contextmanager
    def admit(self) -> Iterator[Callable[[int], None]]:
        """Count one request as in flight until the block ends.

        Yields:
            A function that reserves a number of bytes for the request until the block ends.

        Raises:
            HTTPException: 429 if a limit is exceeded on entry or during a call to that function.
        """
        own_bytes = 0

        def reserve(count: int) -> None:
            nonlocal own_bytes
            own_bytes += count
            self.buffered_bytes += count
            if self.buffered_bytes > self.limits.buffered_bytes:
                raise too_busy()

        self.requests += 1
        try:
            if self.requests > self.limits.requests:
                raise too_busy()
            yield reserve
        finally:
            self.requests -= 1
            self.buffered_bytes -= own_bytes
