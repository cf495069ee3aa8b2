"""The processes that decode: whose turn it is, and what becomes of one that misbehaves."""

import asyncio

import pytest
from fastapi import HTTPException

from resnet56.serve import decoding
from resnet56.serve.decode_worker import DECODED, REFUSED
from resnet56.serve.decoding import Decoders, Progress
from resnet56.serve.limits import Limits


class Worker:
    """Answers as it is told; remembers whom it has answered."""

    answer = DECODED, bytes(3 * 32 * 32)

    def __init__(self, _: Limits) -> None:
        self.alive = False
        self.names: list[str] = []
        self.starts = 0

    async def start(self) -> None:
        self.alive = True
        self.starts += 1

    async def ask(self, content: bytes, name: str) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        self.names.append(name)
        self.answered(name)
        return self.answer

    @staticmethod
    def answered(name: str) -> None:
        """Called just before the process is free again."""

    def kill(self) -> None:
        self.alive = False

    async def stop(self) -> None:
        self.kill()


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_Worker", Worker)


def test_images_are_decoded_in_the_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer that comes as a process is freed does not go before those who have waited."""

    async def arrive() -> list[str]:
        async with Decoders(Limits(decoders=1)) as decoders:
            newcomers = []

            def answered(name: str) -> None:
                if len(newcomers) < 3:
                    newcomers.append(asyncio.create_task(decoders.decode(b"", "new")))

            monkeypatch.setattr(Worker, "answered", staticmethod(answered))
            await asyncio.gather(*(decoders.decode(b"", name) for name in "abc"))
            await asyncio.gather(*newcomers)
            return decoders.workers[0].names  # type: ignore[attr-defined]

    assert asyncio.run(arrive()) == ["a", "b", "c", "new", "new", "new"]


def test_a_client_that_gives_up_leaves_the_process_to_others() -> None:
    async def leave() -> list[str]:
        async with Decoders(Limits(decoders=1)) as decoders:
            tasks = [asyncio.create_task(decoders.decode(b"", name)) for name in "abc"]
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.wait_for(tasks[2], 10)
            return decoders.workers[0].names  # type: ignore[attr-defined]

    assert asyncio.run(leave())[-1] == "c"


@pytest.mark.parametrize("answer", [(DECODED, b"short"), (REFUSED, b"\xff"), (9, b"\xff")])
def test_a_process_that_answers_nonsense_is_replaced(
    answer: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose decoder has been taken over might."""

    async def ask() -> int:
        async with Decoders(Limits(decoders=1)) as decoders:
            with monkeypatch.context() as patch:
                patch.setattr(Worker, "answer", answer)
                with pytest.raises(HTTPException, match="its decoder crashed"):
                    await decoders.decode(b"", "a")
            await decoders.decode(b"", "b")
            return decoders.workers[0].starts  # type: ignore[attr-defined]

    assert asyncio.run(ask()) == 2


def test_progress_stalls_only_while_someone_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(decoding.time, "monotonic", lambda: now)
    progress = Progress()
    assert not progress.stalled(10)
    with progress.wait():
        now += 9
        assert not progress.stalled(10)
        now += 2
        assert progress.stalled(10)
        progress.advance()
        assert not progress.stalled(10)
        now += 11
        with progress.wait():
            assert progress.stalled(10)
    assert not progress.stalled(10)
