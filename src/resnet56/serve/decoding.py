"""Decode uploads in subprocesses, each with a deadline and a memory limit."""

import asyncio
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException

from resnet56.data.images import SIZE, UInt8Array
from resnet56.serve.decode_worker import DECODED, OUT_OF_MEMORY, READY, REQUEST, RESPONSE
from resnet56.serve.limits import Limits

START_SECONDS = 60.0  # time limit for starting a process, long enough for a loaded machine
RETRY_SECONDS = 1.0  # time between attempts to replace a process
MAX_RESPONSE_BYTES = 10_000  # larger than any valid response
ALARM_DELAY = 5  # time from the server's deadline to the process's alarm, in seconds


T = TypeVar("T")


class StallDetector:
    """Detects whether a processing stage has stalled: requests are waiting, and none completes."""

    def __init__(self) -> None:
        self.pending = 0
        self.last_progress = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count one more request as waiting until the `with` block ends."""
        if self.pending == 0:
            self.last_progress = time.monotonic()
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1

    def advance(self) -> None:
        """Record that a request completed the stage."""
        self.last_progress = time.monotonic()

    def stalled(self, seconds: float) -> bool:
        """Return whether requests are waiting and none has completed for `seconds` seconds."""
        return self.pending > 0 and time.monotonic() - self.last_progress > seconds


class Decoders:
    """A pool of decoding processes. It kills and replaces a process that exceeds its deadline.

    The process pools of the standard library cannot kill a process at a deadline. Each process of
    this pool has its own pipes, so killing one process does not affect the others.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.progress = StallDetector()
        self.workers = [_Worker(limits) for _ in range(limits.decoders)]
        self.idle: list[_Worker] = []
        # The semaphore counts the idle workers and serves requests in order. In an asyncio queue, a
        # new request could overtake waiting requests.
        self.available = asyncio.Semaphore(0)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "Decoders":
        """Start the processes."""
        await asyncio.gather(*(worker.start() for worker in self.workers))
        for worker in self.workers:
            self._release(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill all processes, including busy ones."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    @property
    def ready(self) -> bool:
        """True if the pool can decode images."""
        alive = any(worker.alive for worker in self.workers)
        return alive and not self.progress.stalled(self.limits.stall_seconds)

    async def decode(self, content: bytes, name: str) -> UInt8Array:
        """Decode an image file.

        Args:
            content: the image file.
            name: name of the image in error messages.

        Returns:
            A uint8 image (3, 32, 32).

        Raises:
            HTTPException: 422 if the image cannot be decoded within the limits.
        """
        with self.progress.waiting():
            # In the worst case, all processes have already ended for reasons unrelated to this
            # image.
            for _ in range(len(self.workers) + 1):
                worker = await self._acquire()
                # With `shield`, the task reads the response even if the client disconnects.
                result = await asyncio.shield(self._create_task(self._use(worker, content, name)))
                if isinstance(result, np.ndarray):
                    return result
                if result is not None:
                    raise HTTPException(422, result)
        raise HTTPException(422, f"cannot read {name}: the decoder crashed; re-encode the image")

    async def _acquire(self) -> "_Worker":
        """Return a worker as soon as one is idle. Replace workers that ended while idle."""
        await self.available.acquire()
        while not (worker := self.idle.pop()).alive:
            self._create_task(self._replace(worker))
            await self.available.acquire()
        return worker

    def _release(self, worker: "_Worker") -> None:
        self.idle.append(worker)
        self.available.release()

    def _create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Create a task, and keep a reference to it so that it is not garbage-collected."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _use(self, worker: "_Worker", content: bytes, name: str) -> UInt8Array | str | None:
        """Decode an image. Return the pixels or an error message, or None if the process ended."""
        message = f"cannot read {name}: "
        seconds = self.limits.decode_seconds
        try:
            async with asyncio.timeout(seconds):
                status, body = await worker.request(content, name)
            result: UInt8Array | str | None = _pixels(body) if status == DECODED else body.decode()
        except TimeoutError:
            result = f"{message}decoding takes longer than {seconds:g} seconds; re-encode the image"
        except (OSError, asyncio.IncompleteReadError, ValueError):
            result = None
        else:
            self._release(worker)
            if status == OUT_OF_MEMORY:
                mebibytes = self.limits.decode_bytes >> 20
                return message + f"decoding requires more than {mebibytes} MiB; use a smaller image"
            self.progress.advance()
            return result
        worker.kill()
        self._create_task(self._replace(worker))
        return result

    async def _replace(self, worker: "_Worker") -> None:
        """Restart a worker, retrying until it starts, and return it to the pool."""
        await worker.stop()
        while not worker.alive:
            try:
                await worker.start()
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                # The machine may be out of memory or process IDs.
                await worker.stop()
                await asyncio.sleep(RETRY_SECONDS)
        self._release(worker)


def _pixels(body: bytes) -> UInt8Array:
    return np.frombuffer(body, np.uint8).reshape(3, SIZE, SIZE)


class _Worker:
    """One decoding process."""

    def __init__(self, limits: Limits) -> None:
        self.arguments = (
            str(limits.pixels),
            str(limits.decode_bytes),
            str(int(limits.decode_seconds) + ALARM_DELAY),
            *limits.formats,
        )
        self.process: asyncio.subprocess.Process | None = None
        self.killed = False

    @property
    def alive(self) -> bool:
        return not self.killed and self.process is not None and self.process.returncode is None

    async def start(self) -> None:
        """Start the process and wait until it is ready."""
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, sys.path))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "resnet56.serve.decode_worker", *self.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # Decoders in C can write unlimited output.
            env={**os.environ, **threads, "PYTHONPATH": path},
            # Ctrl-C must reach only the server, which then finishes the requests in flight.
            start_new_session=True,
        )  # fmt: skip
        self.killed = False
        assert self.process.stdout
        async with asyncio.timeout(START_SECONDS):
            await self.process.stdout.readexactly(len(READY))

    async def request(self, content: bytes, name: str) -> tuple[int, bytes]:
        """Send an image file, and return the status and the body of the response."""
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        encoded_name = name.encode()
        head = REQUEST.pack(len(encoded_name), len(content))
        self.process.stdin.write(head + encoded_name)
        self.process.stdin.write(content)
        await self.process.stdin.drain()
        status, length = RESPONSE.unpack(await self.process.stdout.readexactly(RESPONSE.size))
        if length > MAX_RESPONSE_BYTES:
            raise ValueError("the response is too long; the process may be compromised")
        return status, await self.process.stdout.readexactly(length)

    def kill(self) -> None:
        """Kill the process without waiting for it."""
        if self.alive:
            assert self.process
            self.killed = True
            with suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """Kill the process and wait until it ends."""
        self.kill()
        if self.process:
            if self.process.stdin:
                self.process.stdin.close()
            await self.process.wait()
