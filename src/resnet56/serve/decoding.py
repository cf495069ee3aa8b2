"""Decode uploads in processes of their own, each with a deadline and a memory limit."""

import asyncio
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException

from resnet56.data.images import SIZE, Bytes
from resnet56.serve.decode_worker import ANSWER, DECODED, NO_MEMORY, READY, REQUEST
from resnet56.serve.limits import Limits

START_SECONDS = 60.0  # for a process to start, on a machine that is very busy
RETRY_SECONDS = 1.0  # between attempts to replace one
LONGEST = 10_000  # bytes of an answer: the pixels, or a line
GRACE = 5  # seconds after its deadline that a process ends by itself, if nobody has ended it


T = TypeVar("T")


class Progress:
    """Whether requests are waiting at a stage while none gets through."""

    def __init__(self) -> None:
        self.waiting = 0
        self.since = 0.0

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Be waiting inside the block."""
        if self.waiting == 0:
            self.since = time.monotonic()
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def advance(self) -> None:
        """One got through."""
        self.since = time.monotonic()

    def stalled(self, seconds: float) -> bool:
        """Whether some have been waiting that long without one getting through."""
        return self.waiting > 0 and time.monotonic() - self.since > seconds


class Decoders:
    """A few processes that decode images; one that takes too long is ended and replaced.

    The pools of the standard library end no process at its deadline. Here each process has pipes
    of its own, so that ending one disturbs no other.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.progress = Progress()
        self.workers = [_Worker(limits) for _ in range(limits.decoders)]
        self.idle: list[_Worker] = []
        # As many as are idle. A queue would let a newcomer go before those who have waited.
        self.turn = asyncio.Semaphore(0)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "Decoders":
        """Start the processes."""
        await asyncio.gather(*(worker.start() for worker in self.workers))
        for worker in self.workers:
            self._offer(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the processes, whatever they do."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    @property
    def ready(self) -> bool:
        """Whether images can be decoded."""
        alive = any(worker.alive for worker in self.workers)
        return alive and not self.progress.stalled(self.limits.stall_seconds)

    async def decode(self, content: bytes, name: str) -> Bytes:
        """(3, 32, 32) from an image file; `name` is what an error calls it.

        Raises:
            HTTPException: 422 if it cannot be decoded within the limits.
        """
        with self.progress.wait():
            await self.turn.acquire()
            while not (worker := self.idle.pop()).alive:  # it ended while it was idle
                self._keep(self._replace(worker))
                await self.turn.acquire()
            # A task, so that a client that gives up leaves no process in the midst of an answer.
            answer = await asyncio.shield(self._keep(self._use(worker, content, name)))
        if isinstance(answer, str):
            raise HTTPException(422, answer)
        return answer

    def _offer(self, worker: "_Worker") -> None:
        self.idle.append(worker)
        self.turn.release()

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it in a task that is not collected meanwhile."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _use(self, worker: "_Worker", content: bytes, name: str) -> Bytes | str:
        """The pixels, or why there are none."""
        problem = f"cannot read {name}: "
        seconds = self.limits.decode_seconds
        try:
            async with asyncio.timeout(seconds):
                status, body = await worker.ask(content, name)
            answer = _pixels(body) if status == DECODED else body.decode()
        except TimeoutError:
            problem += f"decoding it takes longer than {seconds:g} seconds; save it anew"
        except (OSError, asyncio.IncompleteReadError, ValueError):
            problem += "its decoder crashed; save it anew"
        else:
            self._offer(worker)
            if status == NO_MEMORY:
                megabytes = self.limits.decode_bytes >> 20
                return problem + f"decoding it takes more than {megabytes} MiB; make it smaller"
            self.progress.advance()
            return answer
        worker.kill()
        self._keep(self._replace(worker))
        return problem

    async def _replace(self, worker: "_Worker") -> None:
        """Start it anew, however long that takes, and offer it again."""
        await worker.stop()
        while not worker.alive:
            try:
                await worker.start()
            except (OSError, TimeoutError, asyncio.IncompleteReadError):  # no memory, no processes
                await worker.stop()
                await asyncio.sleep(RETRY_SECONDS)
        self._offer(worker)


def _pixels(body: bytes) -> Bytes:
    return np.frombuffer(body, np.uint8).reshape(3, SIZE, SIZE)


class _Worker:
    """One process."""

    def __init__(self, limits: Limits) -> None:
        self.arguments = (
            str(limits.pixels),
            str(limits.decode_bytes),
            str(int(limits.decode_seconds) + GRACE),
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
            stderr=asyncio.subprocess.DEVNULL,  # decoders in C write there, without end
            env={**os.environ, **threads, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the server, which answers what has begun
        )  # fmt: skip
        self.killed = False
        assert self.process.stdout
        async with asyncio.timeout(START_SECONDS):
            await self.process.stdout.readexactly(len(READY))

    async def ask(self, content: bytes, name: str) -> tuple[int, bytes]:
        """The status and the body of its answer."""
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        title = name.encode()
        self.process.stdin.write(REQUEST.pack(len(title), len(content)) + title)
        self.process.stdin.write(content)
        await self.process.stdin.drain()
        status, length = ANSWER.unpack(await self.process.stdout.readexactly(ANSWER.size))
        if length > LONGEST:
            raise ValueError("a decoder has taken over the process")
        return status, await self.process.stdout.readexactly(length)

    def kill(self) -> None:
        """End it now."""
        if self.alive:
            assert self.process
            self.killed = True
            with suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """End it now, and wait for that."""
        self.kill()
        if self.process:
            if self.process.stdin:
                self.process.stdin.close()
            await self.process.wait()
