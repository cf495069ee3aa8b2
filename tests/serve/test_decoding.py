"""The decoding pool: the order of requests, and the replacement of faulty processes."""

import asyncio

import pytest
from fastapi import HTTPException

from resnet56.serve import decoding
from resnet56.serve.decode_worker import DECODED, REJECTED
from resnet56.serve.decoding import Decoders, StallDetector
from resnet56.serve.limits import Limits


class FakeWorker:
    """Returns a fixed response, and records the names of the images."""

    response = DECODED, bytes(3 * 32 * 32)

    def __init__(self, _: Limits) -> None:
        self.alive = False
        self.names: list[str] = []
        self.starts = 0

    async def start(self) -> None:
        self.alive = True
        self.starts += 1

    async def request(self, content: bytes, name: str) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        self.names.append(name)
        self.on_response(name)
        return self.response

    @staticmethod
    def on_response(name: str) -> None:
        """Run just before the worker is released. Tests replace this method."""

    def kill(self) -> None:
        self.alive = False

    async def stop(self) -> None:
        self.kill()


@pytest.fixture(autouse=True)
def _use_fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_Worker", FakeWorker)


def test_images_are_decoded_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives when a worker is released does not overtake waiting requests."""

    async def decode_all() -> list[str]:
        async with Decoders(Limits(decoders=1)) as decoders:
            late_tasks = []

            def on_response(name: str) -> None:
                if len(late_tasks) < 3:
                    late_tasks.append(asyncio.create_task(decoders.decode(b"", "late")))

            monkeypatch.setattr(FakeWorker, "on_response", staticmethod(on_response))
            await asyncio.gather(*(decoders.decode(b"", name) for name in "abc"))
            await asyncio.gather(*late_tasks)
            return decoders.workers[0].names  # type: ignore[attr-defined]

    assert asyncio.run(decode_all()) == ["a", "b", "c", "late", "late", "late"]


def test_a_disconnected_client_does_not_block_the_worker() -> None:
    async def disconnect() -> list[str]:
        async with Decoders(Limits(decoders=1)) as decoders:
            tasks = [asyncio.create_task(decoders.decode(b"", name)) for name in "abc"]
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.wait_for(tasks[2], 10)
            return decoders.workers[0].names  # type: ignore[attr-defined]

    assert asyncio.run(disconnect())[-1] == "c"


@pytest.mark.parametrize("response", [(DECODED, b"short"), (REJECTED, b"\xff"), (9, b"\xff")])
def test_a_worker_with_an_invalid_response_is_replaced(
    response: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compromised decoder could send such a response."""

    async def decode_two() -> int:
        async with Decoders(Limits(decoders=1)) as decoders:
            with monkeypatch.context() as patch:
                patch.setattr(FakeWorker, "response", response)
                with pytest.raises(HTTPException, match="the decoder crashed"):
                    await decoders.decode(b"", "a")
            await decoders.decode(b"", "b")
            return decoders.workers[0].starts  # type: ignore[attr-defined]

    assert asyncio.run(decode_two()) == 3  # the pool sent the image to two workers


def test_the_pool_stalls_only_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(decoding.time, "monotonic", lambda: now)
    detector = StallDetector()
    assert not detector.stalled(10)
    with detector.waiting():
        now += 9
        assert not detector.stalled(10)
        now += 2
        assert detector.stalled(10)
        detector.advance()
        assert not detector.stalled(10)
        now += 11
        with detector.waiting():
            assert detector.stalled(10)
    assert not detector.stalled(10)
