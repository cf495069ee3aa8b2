"""From a request to its answer: let in, received, unpacked, run, put into words."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import numpy as np
import numpy.typing as npt
from fastapi import Request

from resnet56.data.images import Bytes, Floats
from resnet56.metrics import softmax
from resnet56.predict import likeliest
from resnet56.serve.batching import Batcher, Predictor
from resnet56.serve.decoding import Decoders, Progress
from resnet56.serve.limits import Gate, Limits, busy
from resnet56.serve.meter import Meter
from resnet56.serve.schema import Answer, ClassScore, Prediction
from resnet56.serve.uploads import Upload, receive

DIGITS = 6  # decimals of the numbers in an answer


class Service:
    """A network behind a gate."""

    def __init__(self, predictor: Predictor, limits: Limits, meter: Meter) -> None:
        self.predictor = predictor
        self.limits = limits
        self.meter = meter
        self.gate = Gate(limits)
        self.batcher = Batcher(predictor, seen=meter.batches.observe)
        self.network = Progress()
        self.decoders = Decoders(limits)
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> "Service":
        """Start working."""
        await self.stack.enter_async_context(self.decoders)
        await self.stack.enter_async_context(self.batcher)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop working."""
        await self.stack.aclose()

    @property
    def ready(self) -> bool:
        """Whether images can be answered."""
        return self.decoders.ready and not self.network.stalled(self.limits.stall_seconds)

    async def answer(self, request: Request, top: int, maps: bool) -> Answer:
        """The `top` likeliest classes of each picture in a request, with their maps if asked for.

        Raises:
            HTTPException: 4xx, if the request is at fault or there is no room for it.
        """
        with self.gate.enter() as take:
            async with receive(request, self.limits, take) as uploads:
                try:
                    async with asyncio.timeout(self.limits.answer_seconds):
                        images = await self._decode(uploads)
                        with self.network.wait():
                            logits, evidence = await self.batcher.run(images)
                        self.network.advance()
                except TimeoutError:
                    raise busy() from None
        self.meter.images.inc(len(logits))
        return Answer(
            network=self.predictor.name,
            predictions=[
                _prediction(self.predictor.classes, shares, places if maps else None, top)
                for shares, places in zip(softmax(logits), evidence, strict=True)
            ],
        )

    async def _decode(self, uploads: Sequence[Upload]) -> Bytes:
        """(N, 3, 32, 32); a few at a time, so that many pictures do not block others."""

        async def decode(upload: Upload) -> Bytes:
            return await self.decoders.decode(await upload.read(), upload.name)

        images: list[Bytes] = []
        for start in range(0, len(uploads), self.limits.decoders):
            few = uploads[start : start + self.limits.decoders]
            images += await asyncio.gather(*map(decode, few))
        return np.stack(images)


def _prediction(
    classes: tuple[str, ...], probabilities: npt.NDArray[np.float64], maps: Floats | None, top: int
) -> Prediction:
    """The likeliest classes of one picture."""
    return Prediction(
        classes=[
            ClassScore(
                name=classes[index],
                probability=round(float(probabilities[index]), DIGITS),
                map=None if maps is None else maps[index].astype(float).round(DIGITS).tolist(),
            )
            for index in likeliest(probabilities, top)
        ]
    )
