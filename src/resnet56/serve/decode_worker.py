"""The process in which the server decodes: python -m resnet56.serve.decode_worker ...

It reads images from stdin and writes answers to stdout, one after the other, until stdin ends.
Whatever a decoder does, it does it here: the server ends this process and starts another.

    request: length of the name, length of the file (REQUEST), name, file
    answer:  status, length (ANSWER), then (3, 32, 32) bytes, or why there are none
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
ANSWER = struct.Struct("<BI")
DECODED, REFUSED, NO_MEMORY = range(3)
READY = b"\n"  # written once it can take images


def main(arguments: list[str]) -> int:
    """Decode until stdin ends.

    Args:
        arguments: the largest image in pixels, the bytes of memory and the seconds that decoding
            may take, and the formats to accept.
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
        # The server ends a process that takes too long, unless it has been killed itself.
        _end_after(seconds)
        status, answer = _answer(content, name, max_pixels, formats)
        _end_after(0)
        sink.write(ANSWER.pack(status, len(answer)) + answer)
        sink.flush()
    return 0


def _answer(
    content: bytes, name: str, max_pixels: int, formats: tuple[str, ...]
) -> tuple[int, bytes]:
    try:
        pixels = read_pixels(content, name=name, max_pixels=max_pixels, formats=formats)
        return DECODED, pixels.tobytes()
    except ImageError as error:
        return REFUSED, str(error).encode()
    except MemoryError:
        return NO_MEMORY, b""


def _load_decoders() -> None:
    """Import Pillow's plugins now, before memory is limited; AVIF would use every core."""
    Image.init()
    with contextlib.suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def _limit_resources(memory: int) -> None:
    """Limit the memory beyond what is in use; write no file, dump no core. POSIX only."""
    try:
        import resource
    except ImportError:
        return
    in_use = psutil.Process().memory_info().vms
    for kind, most in (
        (resource.RLIMIT_AS, in_use + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS limits no address space
            resource.setrlimit(kind, (most, most))


def _end_after(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)  # its default action ends the process, also in the midst of C


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
