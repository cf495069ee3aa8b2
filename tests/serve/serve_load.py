"""A server under load: many clients at once, friendly ones and others.

    resnet56 serve --run RUN &
    python tests/serve/serve_load.py [http://127.0.0.1:8056] [CLIENTS] [SECONDS] [HOSTILE]

HOSTILE is the share of requests whose file would cost a careless decoder minutes or gigabytes.
Prints requests per second, latencies, answers by status and the server's memory over time. Ends
with 1 if an answer was a 5xx or another than the request deserved.
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
class Kind:
    """A kind of request: its bytes, how often it comes, and the answers it may get."""

    name: str
    often: float
    content: bytes
    deserved: set[int] = field(default_factory=set)  # none: it breaks off


def request(content: bytes, media_type: str = FORM, length: int | None = None) -> bytes:
    head = (
        "POST /v1/predict?maps=true HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: {media_type}\r\nContent-Length: {length or len(content)}\r\n\r\n"
    )
    return head.encode() + content


def form(*files: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


def encoded(pixels: "np.typing.NDArray[np.uint8]", kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def kinds() -> list[Kind]:
    """Two thirds photographs and small pictures, one third what goes wrong or is meant to."""
    cat = skimage.data.chelsea()
    photo, small = encoded(cat, "JPEG"), encoded(cat[100:132, 200:232], "PNG")
    huge = encoded(np.tile(cat, (10, 9, 1)), "JPEG")  # 12 million pixels, as from a phone
    bomb = bytearray(encoded(np.zeros((1, 1, 3), np.uint8), "PNG"))
    bomb[16:24] = b"\x00\x00\xff\xff" * 2  # 65,535 pixels wide and high, if one believes the head
    fine, unfit = {200}, {422}
    return [
        Kind("photograph", 40, request(form(photo)), fine),
        Kind("small picture", 25, request(form(small)), fine),
        Kind("eight pictures", 3, request(form(*[photo] * 8)), fine),
        Kind("12 megapixels", 1, request(form(huge)), fine),
        Kind("text file", 4, request(form(b"no picture " * 100)), unfit),
        Kind("truncated picture", 4, request(form(photo[: len(photo) // 2])), unfit),
        Kind("damaged picture", 4, request(form(small[:60] + b"?" + small[61:])), unfit),
        Kind("decompression bomb", 4, request(form(bytes(bomb))), unfit),
        Kind("random bytes", 3, request(form(random.Random(0).randbytes(20_000))), unfit),
        Kind("too many pictures", 2, request(form(*[small] * 40)), {413}),
        Kind("too large a body", 1, request(form(bytes(17 * 2**20))), {413}),
        Kind("no such type", 2, request(photo, "image/jpeg"), {415}),
        Kind("nested JSON", 2, request(b"[" * 200_000, "application/json"), unfit),
        Kind("no multipart", 2, request(b"--y" + photo), {400}),
        Kind("no HTTP", 1, b"\x16\x03\x01\x00\x00\r\n\r\n", {400}),
        Kind("breaks off", 2, request(form(photo)[:5000], length=50_000)),
    ]


class Client:
    """Asks one thing after the other, over one connection as long as that holds."""

    def __init__(self, host: str, port: int) -> None:
        self.place = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, kind: Kind) -> tuple[int, bytes]:
        """The status and the body of the answer; status 0 where there is none."""
        if self.reader is None or self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection(*self.place)
        try:
            self.writer.write(kind.content)
            if not kind.deserved:
                self.close()
                return 0, b""
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            body = await (self.reader.readexactly(int(length[1])) if length else self.reader.read())
            await self.writer.drain()  # what was refused early is still to be sent
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0, b""
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        """Hang up."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def hostile_kinds(share: float, others: list[Kind]) -> list[Kind]:
    """Requests of hostile files, so often that they are that share of all, with `others`."""
    if not share:
        return []
    often = share / (1 - share) * sum(kind.often for kind in others) / (len(HOSTILE) + 1)
    return [
        *(Kind(name, often, request(form(make())), {422}) for name, make in HOSTILE.items()),
        # Within every bound, and yet seconds of a core: the deadline decides.
        Kind("slow JPEG", often, request(form(slow_jpeg())), {200, 422}),
    ]


def slow_jpeg() -> bytes:
    """A progressive JPEG of 24 million pixels and nearly 100 scans."""
    content = io.BytesIO()
    Image.new("L", (4900, 4900), 90).save(content, "JPEG", progressive=True, quality=30)
    whole = content.getvalue()
    return whole[:-2] + 85 * whole[whole.rindex(b"\xff\xda") : -2] + whole[-2:]


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of the answers with 200

    def add(self, kind: Kind, status: int, seconds: float) -> None:
        """One answer."""
        self.statuses[status] += 1
        if status not in (kind.deserved or {0}) | {429}:
            self.wrong[f"{kind.name}: {status}"] += 1
        if status == 200:
            self.seconds.append(seconds)


async def main(address: str, clients: int, seconds: float, hostile: float = 0.0) -> int:
    place = urlsplit(address)
    host, port = place.hostname or "", place.port or 80
    menu = kinds()
    menu += hostile_kinds(hostile, menu)
    tally, end = Tally(), time.perf_counter() + seconds

    async def work(seed: int) -> None:
        client, chance = Client(host, port), random.Random(seed)
        while time.perf_counter() < end:
            [kind] = chance.choices(menu, [kind.often for kind in menu])
            started = time.perf_counter()
            status, _ = await client.ask(kind)
            tally.add(kind, status, time.perf_counter() - started)
        client.close()

    async def watch() -> None:
        metrics = Kind("", 0, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", {200})
        client = Client(host, port)
        for share in (0, 1 / 6, 1 / 3, 2 / 3, 1):
            await asyncio.sleep(max(0, end - seconds * (1 - share) - time.perf_counter()))
            _, body = await client.ask(metrics)
            client.close()  # it would be idle for too long
            found = re.search(rb"\nprocess_resident_memory_bytes (\S+)", body)
            memory = f"{float(found[1]) / 1e6:.0f} MB" if found else "unknown"
            print(f"after {share * seconds:3.0f} s: memory {memory}", flush=True)

    await asyncio.gather(watch(), *map(work, range(clients)))
    count = sum(tally.statuses.values())
    print(f"{clients} clients, {seconds:g} s: {count / seconds:.0f} requests/s")
    print("latency of answers with 200: ", end="")
    print(", ".join(f"p{p} {1000 * np.percentile(tally.seconds, p):.0f} ms" for p in (50, 90, 99)))
    print("answers by status (0: broken off):", json.dumps(dict(sorted(tally.statuses.items()))))
    print("undeserved:", json.dumps(tally.wrong) if tally.wrong else "none")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    given = sys.argv[1:] + ["http://127.0.0.1:8056", "64", "60", "0"][len(sys.argv) - 1 :]
    sys.exit(asyncio.run(main(given[0], int(given[1]), float(given[2]), float(given[3]))))
