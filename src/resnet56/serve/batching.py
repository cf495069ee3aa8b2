"""Requests that come together go through the network together, in one thread of its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from resnet56.data.images import Bytes, Floats


class Predictor(Protocol):
    """A network ready for use, whatever runs it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its C outputs."""

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """(N, 3, 32, 32) -> logits (N, C) and class-activation maps (N, C, 8, 8)."""


@dataclass(frozen=True)
class _Job:
    images: Bytes
    result: "asyncio.Future[tuple[Floats, Floats]]"


class Batcher:
    """Gathers images for a few milliseconds, or while the network is busy, and runs them at once.

    Args:
        predictor: only ever called from one thread.
        most: images in a run, a power of two. On a CPU 8 to 16 took the least time an image, and
            64 twice as long: their activations no longer fit its caches.
        wait: seconds to wait for company; the event loop stays free meanwhile.
        seen: called with the number of images in every run.
    """

    def __init__(
        self, predictor: Predictor, *, most: int = 16, wait: float = 0.002, seen: Any = None
    ) -> None:
        self.predictor = predictor
        self.most = most
        self.wait = wait
        self.seen = seen or (lambda size: None)
        self.queue: asyncio.Queue[_Job] = asyncio.Queue()
        self.waiting: set[asyncio.Future[tuple[Floats, Floats]]] = set()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def __aenter__(self) -> "Batcher":
        """Start working."""
        self.worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; whoever still waits is told so."""
        self.worker.cancel()
        with suppress(asyncio.CancelledError):
            await self.worker
        for result in self.waiting:  # queued, gathered or running
            result.cancel()
        self.thread.shutdown()

    async def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """What `Predictor.run` says of them, sooner or later."""
        job = _Job(images, asyncio.get_running_loop().create_future())
        self.waiting.add(job.result)
        try:
            await self.queue.put(job)
            return await job.result
        finally:
            self.waiting.remove(job.result)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Those whose client has given up are done already.
            jobs = [job for job in await self._gather() if not job.result.done()]
            if not jobs:
                continue
            try:
                images = np.concatenate([job.images for job in jobs])
                logits, maps = await loop.run_in_executor(self.thread, self._run, images)
            except Exception as error:
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(error)
                continue
            start = 0
            for job in jobs:
                part = slice(start, start := start + len(job.images))
                if not job.result.done():
                    job.result.set_result((logits[part], maps[part]))

    async def _gather(self) -> list[_Job]:
        """The next job, and those that come soon enough to share its batch."""
        jobs = [await self.queue.get()]
        size = len(jobs[0].images)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait):
                while size < self.most:
                    jobs.append(await self.queue.get())
                    size += len(jobs[-1].images)
        return jobs

    def _run(self, images: Bytes) -> tuple[Floats, Floats]:
        """All of them, in runs of one of a few sizes: each is filled up to a power of two.

        PyTorch keeps a plan for every size it has met: with any size up to 95, half a gigabyte.
        """
        runs = []
        for start in range(0, len(images), self.most):
            piece = images[start : start + self.most]
            filled = np.zeros((1 << (len(piece) - 1).bit_length(), *piece.shape[1:]), np.uint8)
            filled[: len(piece)] = piece
            logits, maps = self.predictor.run(filled)
            self.seen(len(piece))
            runs.append((logits[: len(piece)], maps[: len(piece)]))
        return np.concatenate([one for one, _ in runs]), np.concatenate([one for _, one in runs])
