"""How much of anything a client may ask for. Beyond it is a 4xx answer that says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException

from resnet56.data.images import BROWSER_FORMATS


@dataclass(frozen=True)
class Limits:
    """Generous for people and programs, tight for accidents and attacks."""

    images: int = 32  # in a request
    pixels: int = 25_000_000  # of a picture: what phones take unless asked for more
    body_bytes: int = 16 * 2**20  # of a request
    body_seconds: float = 30.0  # for a request to arrive whole
    answer_seconds: float = 30.0  # from there to the answer
    requests: int = 128  # under way at the same time
    held_bytes: int = 256 * 2**20  # bodies of all requests under way
    formats: tuple[str, ...] = BROWSER_FORMATS  # of images, by Pillow's names
    decoders: int = 2  # processes that decode
    decode_seconds: float = 6.0  # for one image; the slowest ordinary ones take about one
    decode_bytes: int = 768 * 2**20  # of memory for one image; the largest ordinary ones take 400
    stall_seconds: float = 10.0  # without an answer while requests wait, until /healthz fails
    drain_seconds: float = 30.0  # to answer what has begun, once asked to stop


def busy() -> HTTPException:
    """The answer where another client's work leaves no room."""
    return HTTPException(
        429, "too many requests in flight; retry in a second", {"Retry-After": "1"}
    )


class Gate:
    """Knows what is under way, and turns away what would be too much."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = self.held_bytes = 0

    @contextmanager
    def enter(self) -> Iterator[Callable[[int], None]]:
        """Be under way inside the block.

        Yields:
            A function to call with the bytes of the body as they come.

        Raises:
            HTTPException: 429, here or from that function.
        """
        own = 0

        def take(count: int) -> None:
            nonlocal own
            own += count
            self.held_bytes += count
            if self.held_bytes > self.limits.held_bytes:
                raise busy()

        self.requests += 1
        try:
            if self.requests > self.limits.requests:
                raise busy()
            yield take
        finally:
            self.requests -= 1
            self.held_bytes -= own
