"""Decode images in a subprocess of the server: python -m resnet56.serve.decode_worker ...

The process reads requests from stdin and writes responses to stdout until stdin ends. A decoder
that hangs or crashes affects only this process. The server then replaces the process.

    request:   length of the name, length of the file (REQUEST), name, file
    response:  status, length (RESPONSE), then (3, 32, 32) bytes or an error message
"""

import contextlib
import signal
import struct
import sys

import psutil
from PIL import Image

from resnet56.data.images import read_pixels
from resnet56.errors import ImageError

REQUEST = struct.Struct("<II")
RESPONSE = struct.Struct("<BI")
DECODED, REJECTED, OUT_OF_MEMORY = range(3)
READY = b"\n"  # status that the process sends once it is ready for requests


def main(arguments: list[str]) -> int:
    """Decode images until stdin ends.

    Args:
        arguments: the maximum number of pixels per image, the memory limit in bytes, the time
            limit in seconds, and the accepted formats.
    """
    max_pixels, memory, seconds = map(int, arguments[:3])
    formats = tuple(arguments[3:])
    _load_decoders()
    _limit_resources(memory)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(READY)
    sink.flush()
    while head := source.read(REQUEST.size):
        name_length, length = REQUEST.unpack(head)
        name, content = source.read(name_length).decode(), source.read(length)
        # The server kills this process at the deadline. If the server itself is killed, the alarm
        # ends the process.
        _set_alarm(seconds)
        status, body = _decode(content, name, max_pixels, formats)
        _set_alarm(0)
        sink.write(RESPONSE.pack(status, len(body)) + body)
        sink.flush()
    return 0


def _decode(
    content: bytes, name: str, max_pixels: int, formats: tuple[str, ...]
) -> tuple[int, bytes]:
    """Decode an image. Return the status and the body of the response."""
    try:
        pixels = read_pixels(content, name=name, max_pixels=max_pixels, formats=formats)
        return DECODED, pixels.tobytes()
    except ImageError as error:
        return REJECTED, str(error).encode()
    except MemoryError:
        return OUT_OF_MEMORY, b""


def _load_decoders() -> None:
    """Import all Pillow plugins before limiting memory, and restrict AVIF to one thread."""
    Image.init()
    with contextlib.suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def _limit_resources(memory: int) -> None:
    """Limit additional memory, and prevent file writes and core dumps. Has no effect on Windows."""
    try:
        import resource
    except ImportError:
        return
    in_use = psutil.Process().memory_info().vms
    for limited, maximum in (
        (resource.RLIMIT_AS, in_use + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS cannot limit the address space.
            resource.setrlimit(limited, (maximum, maximum))


def _set_alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        # The default action of the signal ends the process even while C code runs.
        signal.alarm(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
