"""Read the images of a multipart or JSON request body, within the limits."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import Message
from functools import partial

from fastapi import HTTPException, Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from resnet56.errors import one_line
from resnet56.serve.limits import Limits
from resnet56.serve.schema import PredictRequest

MULTIPART, JSON = "multipart/form-data", "application/json"
FIELD = "image"
MAX_QUOTE = 100  # maximum number of characters of client input in an error message


@dataclass(frozen=True)
class Upload:
    """An uploaded image file."""

    name: str  # name in error messages: the client's file name or the position of the image
    read: Callable[[], Awaitable[bytes]]  # raises HTTPException if the base64 is invalid


@asynccontextmanager
async def receive(
    request: Request, limits: Limits, reserve: Callable[[int], None]
) -> AsyncIterator[Sequence[Upload]]:
    """Receive the images of a request and hold them in memory until the block ends.

    Args:
        request: the request.
        limits: limits on the body.
        reserve: function that is called with the size of each received chunk.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, or an exception raised by `reserve`.
    """
    media_type = _media_type(request)
    body = _body(request, limits, reserve)
    try:
        async with asyncio.timeout(limits.body_seconds):
            if media_type == JSON:
                files: list[UploadFile] = []
                uploads = await _from_json(body, limits)
            else:
                files = await _from_multipart(request, body, limits)
                uploads = [_upload(file, number) for number, file in enumerate(files, start=1)]
    except TimeoutError:
        raise HTTPException(
            408, f"the request did not arrive within {limits.body_seconds:g} seconds; send it again"
        ) from None
    try:
        if not uploads:
            raise HTTPException(422, f"no image in the request; send one in the field {FIELD!r}")
        if len(uploads) > limits.images:
            raise _too_many(limits)
        yield uploads
    finally:
        for file in files:
            await file.close()


def _media_type(request: Request) -> str:
    """Return the media type of the body. Raises a 415 HTTPException for an unsupported type."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    media_type = header.get_content_type()  # in lowercase, without parameters
    if media_type not in (MULTIPART, JSON):
        received = _quotable(media_type, "this media type")
        raise HTTPException(415, f"send {MULTIPART} or {JSON}, not {received}")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Content-Encoding is not supported; send the body uncompressed")
    return media_type


async def _body(
    request: Request, limits: Limits, reserve: Callable[[int], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the body in chunks. Reject a Content-Length above the limit immediately."""
    error = HTTPException(
        413, f"the request is larger than {limits.body_bytes / 2**20:g} MiB; send fewer images"
    )
    content_length = request.headers.get("content-length", "0")
    if content_length.isdecimal() and int(content_length) > limits.body_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limits.body_bytes:
            raise error
        reserve(len(chunk))
        yield chunk


async def _from_multipart(
    request: Request, body: AsyncGenerator[bytes, None], limits: Limits
) -> list[UploadFile]:
    """Return the files in the field `image`."""
    parser = MultiPartParser(request.headers, body, max_files=limits.images, max_fields=0)
    parser.spool_max_size = limits.body_bytes  # Keep all files in memory.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(limits) from None
        if error.message.startswith("Too many fields"):
            raise _unexpected_field() from None
        raise HTTPException(400, f"the body is not valid {MULTIPART}: {error.message}") from None
    # Older versions of Starlette do not convert FormParserError to MultiPartException. No version
    # converts the UnicodeError that charset=undefined causes.
    except (FormParserError, UnicodeError) as error:
        raise HTTPException(400, f"the body is not valid {MULTIPART}: {one_line(error)}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if any(key != FIELD for key in form):
        await form.close()
        raise _unexpected_field()
    return files


async def _from_json(body: AsyncGenerator[bytes, None], limits: Limits) -> list[Upload]:
    """Return the images in a JSON body.

    The body is parsed in a thread, because parsing a large body would block the event loop.
    """
    content = b"".join([chunk async for chunk in body])
    images = (await asyncio.to_thread(_parse, content, limits)).images
    return [
        Upload(f"images[{index}]", partial(asyncio.to_thread, _decode, text, f"images[{index}]"))
        for index, text in enumerate(images)
    ]


def _parse(content: bytes, limits: Limits) -> PredictRequest:
    """Parse a JSON body. A body with too many images is rejected before it is parsed.

    Base64 contains no commas, so the number of commas in a valid body is one less than the number
    of images.
    """
    if content.count(b",") > limits.images:
        raise _too_many(limits)
    try:
        return PredictRequest.model_validate_json(content)
    except ValidationError as error:
        raise HTTPException(422, validation_message(error.errors())) from None


def _decode(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # b64decode raises ValueError for non-ASCII characters.
        detail = f"{name} is not valid base64; encode the image file in base64"
        raise HTTPException(422, detail) from None


def _upload(file: UploadFile, number: int) -> Upload:
    return Upload(_quotable(file.filename or "", f"image {number}"), file.read)


def _too_many(limits: Limits) -> HTTPException:
    return HTTPException(
        413, f"more than {limits.images} images in the request; send fewer at once"
    )


def _unexpected_field() -> HTTPException:
    return HTTPException(422, f"unexpected form field; send files in the field {FIELD!r} only")


def validation_message(errors: Sequence[object]) -> str:
    """Return a line that describes the first validation error and names its field."""
    error = errors[0]
    assert isinstance(error, dict)
    field = ".".join(str(part) for part in error["loc"] if part not in ("query", "body"))
    return f"{_quotable(field, 'the body')}: {error['msg']}"


def _quotable(text: str, fallback: str) -> str:
    """Return the client input if it is short and printable, or `fallback` otherwise."""
    return text if text and text.isprintable() and len(text) <= MAX_QUOTE else fallback
