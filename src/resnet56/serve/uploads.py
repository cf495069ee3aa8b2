"""Pictures out of a request's body: multipart or JSON, never more of it than the limits allow."""

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
from resnet56.serve.schema import Pictures

MULTIPART, JSON = "multipart/form-data", "application/json"
FIELD = "image"
ECHO = 100  # characters of its own that a client is told at most


@dataclass(frozen=True)
class Upload:
    """A picture as it came, still encoded."""

    name: str  # for messages: what the client calls it, or its place in the list
    read: Callable[[], Awaitable[bytes]]  # HTTPException if it is not what it claims


@asynccontextmanager
async def receive(
    request: Request, limits: Limits, take: Callable[[int], None]
) -> AsyncIterator[Sequence[Upload]]:
    """The pictures of a request, held in memory until the end of the block.

    Raises:
        HTTPException: 400, 408, 413, 415, 422, 429, or what `take` raises.
    """
    kind = _media_type(request)
    body = _body(request, limits, take)
    try:
        async with asyncio.timeout(limits.body_seconds):
            if kind == JSON:
                files: list[UploadFile] = []
                uploads = await _from_json(body, limits)
            else:
                files = await _from_multipart(request, body, limits)
                uploads = [_upload(file, place) for place, file in enumerate(files, start=1)]
    except TimeoutError:
        raise HTTPException(
            408, f"the request did not arrive within {limits.body_seconds:g} seconds; send it again"
        ) from None
    try:
        if not uploads:
            raise HTTPException(422, f"there is no picture; send one in the field {FIELD!r}")
        if len(uploads) > limits.images:
            raise _too_many(limits)
        yield uploads
    finally:
        for file in files:
            await file.close()


def _media_type(request: Request) -> str:
    """The body's type, one of ours; 415 otherwise."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_type()  # lower case, without parameters
    if kind not in (MULTIPART, JSON):
        raise HTTPException(415, f"send {MULTIPART} or {JSON}, not {_echo(kind, 'that')}")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "send the body as it is, without a Content-Encoding")
    return kind


async def _body(
    request: Request, limits: Limits, take: Callable[[int], None]
) -> AsyncGenerator[bytes, None]:
    """The body in pieces, up to the limit; what its length is said to be counts at once."""
    problem = HTTPException(
        413, f"the request is larger than {limits.body_bytes / 2**20:g} MiB; send less at once"
    )
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > limits.body_bytes:
        raise problem
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limits.body_bytes:
            raise problem
        take(len(piece))
        yield piece


async def _from_multipart(
    request: Request, body: AsyncGenerator[bytes, None], limits: Limits
) -> list[UploadFile]:
    """The files in the field `image`."""
    parser = MultiPartParser(request.headers, body, max_files=limits.images, max_fields=0)
    parser.spool_max_size = limits.body_bytes  # nothing is written to the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(limits) from None
        if error.message.startswith("Too many fields"):
            raise HTTPException(422, f"send files in the field {FIELD!r} and no others") from None
        raise HTTPException(400, f"the body cannot be read: {error.message}") from None
    # Older Starlettes let the first through, and all of them what charset=undefined raises.
    except (FormParserError, UnicodeError) as error:
        raise HTTPException(400, f"the body cannot be read: {one_line(error)}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if any(key != FIELD for key in form):
        await form.close()
        raise HTTPException(422, f"send files in the field {FIELD!r} and no others")
    return files


async def _from_json(body: AsyncGenerator[bytes, None], limits: Limits) -> list[Upload]:
    """The pictures of a JSON body; parsed in a thread, because it may be long."""
    content = b"".join([piece async for piece in body])
    pictures = await asyncio.to_thread(_parse, content, limits)
    return [
        Upload(f"images[{place}]", partial(asyncio.to_thread, _decode, text, f"images[{place}]"))
        for place, text in enumerate(pictures.images)
    ]


def _parse(content: bytes, limits: Limits) -> Pictures:
    """A JSON body; refused as it is if it holds too many values, lest they become objects first.

    What is in base64 has no comma, so a list has as many as it has pictures, less one.
    """
    if content.count(b",") > limits.images:
        raise _too_many(limits)
    try:
        return Pictures.model_validate_json(content)
    except ValidationError as error:
        raise HTTPException(422, complaint(error.errors())) from None


def _decode(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise HTTPException(422, f"{name} is not base64") from None


def _upload(file: UploadFile, place: int) -> Upload:
    return Upload(_echo(file.filename or "", f"picture {place}"), file.read)


def _too_many(limits: Limits) -> HTTPException:
    return HTTPException(413, f"more than {limits.images} pictures; send fewer at once")


def complaint(errors: Sequence[object]) -> str:
    """What pydantic found first, in one line that names the place."""
    error = errors[0]
    assert isinstance(error, dict)
    place = ".".join(str(part) for part in error["loc"] if part not in ("query", "body"))
    return f"{_echo(place, 'the body')}: {error['msg']}"


def _echo(text: str, instead: str) -> str:
    """What the client has written, where it is fit for one clean line; `instead` otherwise."""
    return text if text and text.isprintable() and len(text) <= ECHO else instead
