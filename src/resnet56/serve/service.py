"""From a request to its answer: let in, received, unpacked, run, put into words."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from fastapi import HTTPException, Request

from resnet56.data.images import Bytes, Floats, prepare, read_image
from resnet56.errors import Error
from resnet56.predict import likeliest, softmax
from resnet56.serve.batching import Batcher, Predictor
from resnet56.serve.limits import Gate, Limits, busy
from resnet56.serve.meter import Meter
from resnet56.serve.schema import Answer, ClassScore, Prediction
from resnet56.serve.uploads import Upload, receive

DECODERS = 2  # pictures unpacked at the same time: each may take 500 MB for a moment
DIGITS = 6  # decimals of the numbers in an answer


class Service:
    """A network behind a gate."""

    def __init__(self, predictor: Predictor, limits: Limits, meter: Meter) -> None:
        self.predictor = predictor
        self.limits = limits
        self.meter = meter
        self.gate = Gate(limits)
        self.batcher = Batcher(predictor, seen=meter.batches.observe)
        self.decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")

    async def __aenter__(self) -> "Service":
        """Start working."""
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop working."""
        await self.batcher.__aexit__()
        self.decoders.shutdown(wait=False, cancel_futures=True)  # a picture may take long

    async def answer(self, request: Request, top: int, maps: bool) -> Answer:
        """The `top` likeliest classes of each picture in a request, with their maps if asked for.

        Raises:
            HTTPException: 4xx, if the request is at fault or there is no room for it.
        """
        with self.gate.enter() as take:
            async with receive(request, self.limits, take) as uploads:
                try:
                    async with asyncio.timeout(self.limits.answer_seconds):
                        logits, evidence = await self.batcher.run(await self._decode(uploads))
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
        """(N, 3, 32, 32); one after the other, so that many pictures do not block a few."""
        loop = asyncio.get_running_loop()
        pixels = self.limits.pixels
        return np.stack(
            [await loop.run_in_executor(self.decoders, _image, up, pixels) for up in uploads]
        )


def _image(upload: Upload, pixels: int) -> Bytes:
    """(3, 32, 32) out of a file; 422 if it is none that can be read."""
    try:
        return prepare(read_image(upload.read(), name=upload.name, max_pixels=pixels))
    except Error as error:
        raise HTTPException(422, str(error)) from None
    except (MemoryError, OSError):  # of what was put on the disk
        raise busy() from None


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
