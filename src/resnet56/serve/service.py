"""Handle a prediction request, from its admission to the response."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import numpy as np
import numpy.typing as npt
from fastapi import Request

from resnet56.data.images import FloatArray, UInt8Array
from resnet56.metrics import softmax
from resnet56.predict import top_classes
from resnet56.serve.batching import Batcher, Predictor
from resnet56.serve.decoding import Decoders, StallDetector
from resnet56.serve.limits import Limits, RequestLimiter, too_busy
from resnet56.serve.meter import Meter
from resnet56.serve.schema import ClassScore, Prediction, PredictResponse
from resnet56.serve.uploads import Upload, receive

DECIMALS = 6  # decimal places of the numbers in a response


class Service:
    """A model with its decoders, batcher and request limits."""

    def __init__(self, predictor: Predictor, limits: Limits, meter: Meter) -> None:
        self.predictor = predictor
        self.limits = limits
        self.meter = meter
        self.limiter = RequestLimiter(limits)
        self.batcher = Batcher(predictor, on_batch=meter.batches.observe)
        self.inference = StallDetector()
        self.decoders = Decoders(limits)
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> "Service":
        """Start the decoders and the batcher."""
        await self.stack.enter_async_context(self.decoders)
        await self.stack.enter_async_context(self.batcher)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the batcher and the decoders."""
        await self.stack.aclose()

    @property
    def ready(self) -> bool:
        """True if the server can classify images."""
        return self.decoders.ready and not self.inference.stalled(self.limits.stall_seconds)

    async def predict(self, request: Request, top: int, maps: bool) -> PredictResponse:
        """Return the `top` most probable classes of each image, optionally with their maps.

        Raises:
            HTTPException: 4xx if the request is invalid or too large, or if the server is at
                capacity.
        """
        with self.limiter.admit() as reserve:
            async with receive(request, self.limits, reserve) as uploads:
                try:
                    async with asyncio.timeout(self.limits.answer_seconds):
                        images = await self._decode(uploads)
                        with self.inference.waiting():
                            logits, class_maps = await self.batcher.run(images)
                        self.inference.advance()
                except TimeoutError:
                    raise too_busy() from None
        self.meter.images.inc(len(logits))
        return PredictResponse(
            model=self.predictor.name,
            predictions=[
                _prediction(
                    self.predictor.classes, probabilities, image_maps if maps else None, top
                )
                for probabilities, image_maps in zip(softmax(logits), class_maps, strict=True)
            ],
        )

    async def _decode(self, uploads: Sequence[Upload]) -> UInt8Array:
        """Decode the uploads to an array of images (N, 3, 32, 32).

        Only a few images are decoded at a time, so that a large request does not delay others.
        """

        async def decode(upload: Upload) -> UInt8Array:
            return await self.decoders.decode(await upload.read(), upload.name)

        images: list[UInt8Array] = []
        for start in range(0, len(uploads), self.limits.decoders):
            group = uploads[start : start + self.limits.decoders]
            images += await asyncio.gather(*map(decode, group))
        return np.stack(images)


def _prediction(
    classes: tuple[str, ...],
    probabilities: npt.NDArray[np.float64],
    maps: FloatArray | None,
    top: int,
) -> Prediction:
    """Return the `top` most probable classes of one image."""
    return Prediction(
        classes=[
            ClassScore(
                name=classes[index],
                probability=round(float(probabilities[index]), DECIMALS),
                map=None if maps is None else maps[index].astype(float).round(DECIMALS).tolist(),
            )
            for index in top_classes(probabilities, top)
        ]
    )
