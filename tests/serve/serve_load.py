"""Load test of a server, with concurrent well-behaved and hostile clients.

    resnet56 serve --run RUN &
    PYTHONPATH=tests python tests/serve/serve_load.py [URL] [CLIENTS] [SECONDS] [HOSTILE]

URL is http://127.0.0.1:8056 by default. HOSTILE is the fraction of requests with a file that could
take a decoder minutes or gigabytes. The script prints requests per second, latencies, responses by
status, and the memory of the server over time. The exit code is 1 if a response has an unexpected
status.
"""

import asyncio
import io
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
import skimage.data
from hostile_images import HOSTILE
from PIL import Image

FORM = "multipart/form-data; boundary=x"


@dataclass(frozen=True)
class RequestType:
    """A type of request: its bytes, relative frequency, and expected statuses."""

    name: str
    weight: float
    content: bytes
    expected: set[int] = field(default_factory=set)  # empty if the client disconnects


def request(content: bytes, media_type: str = FORM, length: int | None = None) -> bytes:
    head = (
        "POST /v1/predict?maps=true HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: {media_type}\r\nContent-Length: {length or len(content)}\r\n\r\n"
    )
    return head.encode() + content


def form(*files: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


def encode(pixels: "np.typing.NDArray[np.uint8]", image_format: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, image_format)
    return content.getvalue()


def request_types() -> list[RequestType]:
    """Return the types of requests: two thirds are valid, and one third is invalid or malicious."""
    cat = skimage.data.chelsea()
    photo, small = encode(cat, "JPEG"), encode(cat[100:132, 200:232], "PNG")
    huge = encode(np.tile(cat, (10, 9, 1)), "JPEG")  # 12 megapixels, as from a phone
    bomb = bytearray(encode(np.zeros((1, 1, 3), np.uint8), "PNG"))
    bomb[16:24] = b"\x00\x00\xff\xff" * 2  # the header claims 65,535 x 65,535 pixels
    valid, invalid = {200}, {422}
    return [
        RequestType("photograph", 40, request(form(photo)), valid),
        RequestType("small image", 25, request(form(small)), valid),
        RequestType("eight images", 3, request(form(*[photo] * 8)), valid),
        RequestType("12 megapixels", 1, request(form(huge)), valid),
        RequestType("text file", 4, request(form(b"not an image " * 100)), invalid),
        RequestType("truncated image", 4, request(form(photo[: len(photo) // 2])), invalid),
        RequestType("damaged image", 4, request(form(small[:60] + b"?" + small[61:])), invalid),
        RequestType("decompression bomb", 4, request(form(bytes(bomb))), invalid),
        RequestType("random bytes", 3, request(form(random.Random(0).randbytes(20_000))), invalid),
        RequestType("too many images", 2, request(form(*[small] * 40)), {413}),
        RequestType("body too large", 1, request(form(bytes(17 * 2**20))), {413}),
        RequestType("unsupported type", 2, request(photo, "image/jpeg"), {415}),
        RequestType("nested JSON", 2, request(b"[" * 200_000, "application/json"), invalid),
        RequestType("invalid multipart", 2, request(b"--y" + photo), {400}),
        RequestType("invalid HTTP", 1, b"\x16\x03\x01\x00\x00\r\n\r\n", {400}),
        RequestType("disconnects", 2, request(form(photo)[:5000], length=50_000)),
    ]


class Client:
    """Sends requests one after the other, and reconnects when the connection closes."""

    def __init__(self, host: str, port: int) -> None:
        self.address = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, request_type: RequestType) -> tuple[int, bytes]:
        """Send a request. Return the status and body of the response, or (0, b"") without one."""
        if self.reader is None or self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection(*self.address)
        try:
            self.writer.write(request_type.content)
            if not request_type.expected:
                self.close()
                return 0, b""
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            body = await (self.reader.readexactly(int(length[1])) if length else self.reader.read())
            await self.writer.drain()  # an early rejection leaves part of the request unsent
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0, b""
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        """Close the connection."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def hostile_types(fraction: float, others: list[RequestType]) -> list[RequestType]:
    """Return requests with hostile files, weighted to be this fraction of all requests."""
    if not fraction:
        return []
    total = sum(other.weight for other in others)
    weight = fraction / (1 - fraction) * total / (len(HOSTILE) + 1)
    return [
        *(
            RequestType(name, weight, request(form(make())), {422})
            for name, make in HOSTILE.items()
        ),
        # Within all size limits, but decoding takes seconds, so the deadline applies.
        RequestType("slow JPEG", weight, request(form(slow_jpeg())), {200, 422}),
    ]


def slow_jpeg() -> bytes:
    """Return a progressive JPEG of 24 megapixels and nearly 100 scans."""
    content = io.BytesIO()
    Image.new("L", (4900, 4900), 90).save(content, "JPEG", progressive=True, quality=30)
    data = content.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + 85 * last_scan + data[-2:]


@dataclass
class Tally:
    """The collected responses."""

    statuses: Counter[int] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # latencies of responses with status 200

    def add(self, request_type: RequestType, status: int, seconds: float) -> None:
        """Record one response."""
        self.statuses[status] += 1
        if status not in (request_type.expected or {0}) | {429}:
            self.unexpected[f"{request_type.name}: {status}"] += 1
        if status == 200:
            self.seconds.append(seconds)


async def main(address: str, clients: int, seconds: float, hostile: float = 0.0) -> int:
    url = urlsplit(address)
    host, port = url.hostname or "", url.port or 80
    types = request_types()
    types += hostile_types(hostile, types)
    tally, end = Tally(), time.perf_counter() + seconds

    async def work(seed: int) -> None:
        client, generator = Client(host, port), random.Random(seed)
        while time.perf_counter() < end:
            [request_type] = generator.choices(types, [candidate.weight for candidate in types])
            started = time.perf_counter()
            status, _ = await client.send(request_type)
            tally.add(request_type, status, time.perf_counter() - started)
        client.close()

    async def watch() -> None:
        metrics = RequestType(
            "metrics", 0, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}
        )
        client = Client(host, port)
        for fraction in (0, 1 / 6, 1 / 3, 2 / 3, 1):
            await asyncio.sleep(max(0, end - seconds * (1 - fraction) - time.perf_counter()))
            _, body = await client.send(metrics)
            client.close()  # otherwise, the server closes the idle connection
            match = re.search(rb"\nprocess_resident_memory_bytes (\S+)", body)
            memory = f"{float(match[1]) / 1e6:.0f} MB" if match else "unknown"
            print(f"after {fraction * seconds:3.0f} s: memory {memory}", flush=True)

    await asyncio.gather(watch(), *map(work, range(clients)))
    count = sum(tally.statuses.values())
    print(f"{clients} clients, {seconds:g} s: {count / seconds:.0f} requests/s")
    print("latency of responses with 200: ", end="")
    print(", ".join(f"p{p} {1000 * np.percentile(tally.seconds, p):.0f} ms" for p in (50, 90, 99)))
    print(
        "responses by status (0: disconnected):", json.dumps(dict(sorted(tally.statuses.items())))
    )
    print("unexpected:", json.dumps(tally.unexpected) if tally.unexpected else "none")
    return 1 if tally.unexpected else 0


if __name__ == "__main__":
    arguments = sys.argv[1:] + ["http://127.0.0.1:8056", "64", "60", "0"][len(sys.argv) - 1 :]
    sys.exit(
        asyncio.run(main(arguments[0], int(arguments[1]), float(arguments[2]), float(arguments[3])))
    )
