"""Group concurrent requests into batches and run them in a dedicated thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from resnet56.data.images import FloatArray, UInt8Array


class Predictor(Protocol):
    """A model for inference, independent of its backend."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes."""

    def run(self, images: UInt8Array) -> tuple[FloatArray, ...]:
        """Return logits (N, C) and class activation maps (N, C, 8, 8) for images (N, 3, 32, 32).

        Additional outputs are ignored.
        """


@dataclass(frozen=True)
class _Job:
    images: UInt8Array
    result: "asyncio.Future[tuple[FloatArray, FloatArray]]"


class Batcher:
    """Collects images into batches, and runs a model on each batch.

    A batch contains the images that arrive within a few milliseconds, or while the previous batch
    is running.

    Args:
        predictor: the model. All calls to its `run` method come from one thread.
        max_batch: maximum batch size, a power of two. On a CPU, batches of 8 to 16 images take the
            least time per image. Batches of 64 images take twice as long per image because their
            activations do not fit in the caches.
        max_wait: maximum time to wait for more images, in seconds. Waiting does not block the
            event loop.
        on_batch: function that is called with the number of images in each batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_batch: int = 16,
        max_wait: float = 0.002,
        on_batch: Callable[[int], Any] | None = None,
    ) -> None:
        self.predictor = predictor
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.on_batch = on_batch or (lambda size: None)
        self.queue: asyncio.Queue[_Job] = asyncio.Queue()
        self.pending: set[asyncio.Future[tuple[FloatArray, FloatArray]]] = set()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def __aenter__(self) -> "Batcher":
        """Start the worker task."""
        self.worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the worker task and cancel all pending requests."""
        self.worker.cancel()
        with suppress(asyncio.CancelledError):
            await self.worker
        for result in self.pending:  # Jobs may be queued, collected or running.
            result.cancel()
        self.executor.shutdown()

    async def run(self, images: UInt8Array) -> tuple[FloatArray, FloatArray]:
        """Return the logits and class activation maps of images.

        A batch can also contain images from other calls.
        """
        job = _Job(images, asyncio.get_running_loop().create_future())
        self.pending.add(job.result)
        try:
            await self.queue.put(job)
            return await job.result
        finally:
            self.pending.remove(job.result)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # The future of a job is already done if its client has disconnected.
            jobs = [job for job in await self._collect() if not job.result.done()]
            if not jobs:
                continue
            try:
                images = np.concatenate([job.images for job in jobs])
                logits, maps = await loop.run_in_executor(self.executor, self._run, images)
            except Exception as error:
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(error)
                continue
            start = 0
            for job in jobs:
                rows = slice(start, start := start + len(job.images))
                if not job.result.done():
                    job.result.set_result((logits[rows], maps[rows]))

    async def _collect(self) -> list[_Job]:
        """Wait for a job, then collect jobs until the batch is full or `max_wait` has passed."""
        jobs = [await self.queue.get()]
        size = len(jobs[0].images)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait):
                while size < self.max_batch:
                    jobs.append(await self.queue.get())
                    size += len(jobs[-1].images)
        return jobs

    def _run(self, images: UInt8Array) -> tuple[FloatArray, FloatArray]:
        """Run the model on images in batches, each padded to a power of two.

        PyTorch caches a plan for each batch size. For all sizes up to 95, this cache would require
        half a gigabyte.
        """
        logits, maps = [], []
        for start in range(0, len(images), self.max_batch):
            batch = images[start : start + self.max_batch]
            size = len(batch)
            padded = np.zeros((1 << (size - 1).bit_length(), *batch.shape[1:]), np.uint8)
            padded[:size] = batch
            batch_logits, batch_maps, *_ = self.predictor.run(padded)
            self.on_batch(size)
            logits.append(batch_logits[:size])
            maps.append(batch_maps[:size])
        return np.concatenate(logits), np.concatenate(maps)
