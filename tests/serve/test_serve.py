"""The API: what it answers, what it refuses, and that nothing a client sends brings it down."""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
import skimage.data
from PIL import Image
from serve_fixtures import CLASSES, Colours, server
from serve_load import slow_jpeg

from resnet56.cli import main
from resnet56.data.images import FORMATS
from resnet56.errors import UsageError
from resnet56.model import build
from resnet56.predict import load
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.directory import RunDirectory
from resnet56.serve.app import build_app
from resnet56.serve.batching import Batcher
from resnet56.serve.limits import Limits
from resnet56.serve.schema import Pictures
from resnet56.serve.server import listen

with warnings.catch_warnings():  # their business, not ours: what they will call by another name
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import CHECKS, load_all_checks
    from schemathesis.generation import GenerationMode
    from starlette.testclient import TestClient

SMALL = Limits(images=3, pixels=10_000, body_bytes=100_000)
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n--x--\r\n'


def picture(colour: str = "red", size: tuple[int, int] = (40, 60), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head promises a picture of that size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(build_app(Colours(), limits=SMALL), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, *files: bytes, options: str = "") -> httpx.Response:
    parts = [("image", (f"{place}.png", content)) for place, content in enumerate(files)]
    return client.post("/v1/predict" + options, files=parts)  # type: ignore[return-value]


def refused(response: httpx.Response, status: int) -> str:
    """The one line that a refusal consists of."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    detail = response.json()["detail"]
    assert isinstance(detail, str)
    assert detail.isprintable()
    assert 0 < len(detail) < 400
    return detail


# What it answers


def test_every_picture_is_answered_in_order(client: TestClient) -> None:
    response = post(client, picture("blue"), picture("red", kind="JPEG"), options="?top=2")
    assert response.status_code == 200
    assert response.json()["network"] == "colours"
    first, second = response.json()["predictions"]
    assert first["classes"][0] == {"name": "blue", "probability": 1.0}
    assert second["classes"][0]["name"] == "red"
    assert len(second["classes"]) == 2


def test_json_and_multipart_agree_with_the_network(client: TestClient) -> None:
    chance = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(chance).save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    by_json = client.post("/v1/predict?maps=true", json={"images": [text]}).json()
    by_form = post(client, content.getvalue(), options="?maps=true").json()
    assert by_json == by_form
    logits, maps = Colours().run(chance.transpose(2, 0, 1)[None])
    for one in by_json["predictions"][0]["classes"]:
        index = CLASSES.index(one["name"])
        assert np.allclose(one["map"], maps[0, index], atol=1e-6)
        share = np.exp(logits[0, index]) / np.exp(logits[0]).sum()
        assert one["probability"] == pytest.approx(share, abs=1e-6)


def test_health_metrics_and_pages_are_there(client: TestClient) -> None:
    post(client, picture())
    assert client.get("/healthz").json()["classes"] == list(CLASSES)
    counted = client.get("/metrics").text
    assert 'resnet56_requests_total{path="/v1/predict",status="200"}' in counted
    assert "resnet56_images_total" in counted
    assert 'resnet56_batch_images_bucket{le="1.0"}' in counted
    client.get("/nowhere/1")
    client.get("/nowhere/2")
    assert 'path="other",status="404"} 2.0' in client.get("/metrics").text
    for path in ("/", "/docs", "/page.css", "/page.js", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_no_page_names_another_server(client: TestClient) -> None:
    for path in ("/", "/docs", "/page.css", "/page.js"):
        text = client.get(path).text.replace("http://testserver", "")
        assert "://" not in text
        assert 'src="//' not in text


def test_every_answer_has_the_headers_that_browsers_heed(client: TestClient) -> None:
    for response in (client.get("/"), client.get("/nowhere"), post(client), post(client, b"x")):
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_a_page_of_another_name_cannot_reach_a_loopback_server() -> None:
    app = build_app(Colours(), hosts=("localhost", "127.0.0.1"))
    with TestClient(app, base_url="http://localhost:8056") as client:
        assert client.get("/healthz").status_code == 200
        for host in ("127.0.0.1", "LOCALHOST:80"):
            assert client.get("/healthz", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "localhost:80:80", "[localhost", ""):
            refused(client.get("/healthz", headers={"host": host}), 400)  # type: ignore[arg-type]


# What it refuses


def test_a_file_that_is_no_picture_is_named(client: TestClient) -> None:
    assert "1.png" in refused(post(client, picture(), b"no picture"), 422)
    assert "0.png" in refused(post(client, picture()[:-30]), 422)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(client: TestClient) -> None:
    assert "10,000" in refused(post(client, bomb(200, 200)), 422)
    assert refused(post(client, bomb(60_000, 60_000)), 422)
    assert refused(post(client, bomb(2**31 - 1, 2**31 - 1)), 422)


def test_too_many_pictures(client: TestClient) -> None:
    assert "more than 3" in refused(post(client, *[picture()] * 4), 413)
    four = [base64.b64encode(picture()).decode()] * 4
    assert "more than 3" in refused(client.post("/v1/predict", json={"images": four}), 413)


def test_a_list_without_end_is_refused_before_it_becomes_objects(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(_: object) -> object:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(Pictures, "model_validate_json", parse)
    headers = {"content-type": "application/json"}
    for content in (b'{"images": ["", "", "", "", ""]}', b"[1, 1, 1, 1, 1]"):
        response = client.post("/v1/predict", content=content, headers=headers)
        assert "more than 3" in refused(response, 413)  # type: ignore[arg-type]


def test_no_pictures(client: TestClient) -> None:
    assert "images" in refused(client.post("/v1/predict", json={"images": []}), 422)
    body = b"--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert "image" in refused(client.post("/v1/predict", content=body, headers=headers), 422)


def test_a_body_that_is_too_large_with_and_without_a_length(client: TestClient) -> None:
    large = bytes(200_000)
    assert refused(post(client, large), 413)
    pieces = (large[:1000] for _ in range(1000))  # httpx sends a generator in chunks
    headers = {"content-type": "application/json"}
    assert refused(client.post("/v1/predict", content=pieces, headers=headers), 413)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"", 415),
        ({"content-type": "image/png"}, picture(), 415),
        ({"content-type": "image/" + "png" * 200}, b"x", 415),
        ({"content-type": "text/plain; charset=x"}, b"x", 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"x", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"y", 400),
        ({"content-type": "multipart/form-data; boundary=x; charset=undefined"}, FILE, 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n\r\n--x--", 400),
        ({"content-type": "application/json"}, b"[" * 90_000, 422),
        ({"content-type": "application/json"}, b'{"images": ["\xff"]}', 422),
        ({"content-type": "application/json"}, b'{"images": ["no base64!"]}', 422),
        ({"content-type": "application/json"}, '{"images": ["ö"]}'.encode(), 422),
        ({"content-type": "application/json"}, b'{"images": ["eA=="], "more": 1}', 422),
        ({"content-type": "application/json"}, b'{"images": ["eA=="], "\\u001b[2J": 1}', 422),
        ({"content-type": "application/json"}, b'{"' + b"more" * 200 + b'": 1}', 422),
        ({"content-type": "application/json"}, b'{"images": [{"a": 1}]}', 422),
        ({"content-type": "application/json"}, b"null", 422),
    ],
)
def test_what_is_no_request_of_ours(
    client: TestClient, headers: dict[str, str], content: bytes, status: int
) -> None:
    assert refused(client.post("/v1/predict", content=content, headers=headers), status)


@pytest.mark.parametrize("field", ["picture", 'image"; x="'])
def test_another_field(client: TestClient, field: str) -> None:
    response = client.post("/v1/predict", files=[(field, ("a.png", picture()))])
    assert "'image'" in refused(response, 422)  # type: ignore[arg-type]


def test_a_field_that_is_no_file(client: TestClient) -> None:
    form = {"files": {"image": ("a.png", picture())}, "data": {"note": "x"}}
    assert "'image'" in refused(client.post("/v1/predict", **form), 422)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["?top=0", "?top=many", "?maps=perhaps", "?top=99999999999"])
def test_options_out_of_range(client: TestClient, options: str) -> None:
    name = options.strip("?").partition("=")[0]
    assert refused(post(client, picture(), options=options), 422).startswith(f"{name}: ")


def test_a_name_that_would_deceive_a_terminal_or_fill_it_is_not_repeated(
    client: TestClient,
) -> None:
    for name in ("\x1b[2Ja.png", "\u202egnp.exe", "a" * 500):
        response = client.post("/v1/predict", files=[("image", (name, b"x"))])
        assert "picture 1" in refused(response, 422)  # type: ignore[arg-type]


def test_nothing_is_written_to_the_disk(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollover(_: object) -> None:
        raise AssertionError("an upload was written to the disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    large = Limits(body_bytes=8 * 2**20)
    with TestClient(build_app(Colours(), limits=large)) as client:
        assert post(client, picture() + bytes(6 * 2**20)).status_code == 200


def test_a_bug_is_one_line_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Colours):
        def run(self, images: Any) -> Any:
            raise RuntimeError("the secret of the network")

    with TestClient(build_app(Broken())) as client:
        assert "secret" not in refused(post(client, picture()), 500)
        assert client.get("/healthz").status_code == 200
    assert "the secret of the network" in caplog.text  # with its traceback, for us


# What it refuses to spend on one picture


LARGE = dataclasses.replace(SMALL, pixels=10**8, body_bytes=10**8)


def test_decoding_has_a_deadline_and_the_next_picture_is_answered() -> None:
    limits = dataclasses.replace(LARGE, decode_seconds=0.5)
    large = slow_jpeg()
    with TestClient(build_app(Colours(), limits=limits)) as client:
        for _ in range(3):  # more than there are processes
            assert "longer than 0.5 seconds" in refused(post(client, large), 422)
        assert post(client, picture("blue")).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="the system limits no address space")
def test_decoding_has_a_limit_on_its_memory() -> None:
    limits = dataclasses.replace(LARGE, decode_bytes=30 * 2**20)
    large = picture(size=(5000, 5000))
    with TestClient(build_app(Colours(), limits=limits)) as client:
        for _ in range(3):
            assert "more than 30 MiB" in refused(post(client, large), 422)
        assert post(client, picture("blue")).status_code == 200


def test_a_decoder_that_crashes_is_replaced() -> None:
    app = build_app(Colours())
    with TestClient(app) as client:
        for _ in range(2):
            for child in psutil.Process().children():
                if "decode_worker" in " ".join(child.cmdline()):
                    child.kill()
                    child.wait()
            assert post(client, picture("blue")).status_code == 200


def test_formats_that_browsers_do_not_show_need_an_option(client: TestClient) -> None:
    tiff = picture(kind="TIFF")
    assert "not an image in a format accepted here" in refused(post(client, tiff), 422)
    with TestClient(build_app(Colours(), limits=Limits(formats=FORMATS))) as every:
        assert post(every, tiff).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),  # another port of the same machine
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://testserver:81"}, 403),
        ({"origin": "http://testserver"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_can_send_nothing(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    files = {"image": ("a.png", picture())}
    response = client.post("/v1/predict", files=files, headers=headers)
    assert response.status_code == status
    assert client.get("/healthz", headers=headers).status_code == 200  # a link may lead here


def test_health_fails_while_requests_wait_and_none_is_answered() -> None:
    limits = dataclasses.replace(SMALL, stall_seconds=0.2)
    with TestClient(build_app(Colours(seconds=1.0), limits=limits)) as client:
        assert client.get("/healthz").status_code == 200
        thread = threading.Thread(target=post, args=(client, picture()))
        thread.start()
        time.sleep(0.6)
        assert "waiting" in refused(client.get("/healthz"), 503)
        thread.join()
        assert client.get("/healthz").status_code == 200


def test_health_fails_while_no_decoder_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    large = slow_jpeg()
    limits = dataclasses.replace(LARGE, decode_seconds=0.2, decoders=1)
    with TestClient(build_app(Colours(), limits=limits)) as client:
        monkeypatch.setattr(sys, "executable", "/nonexistent")
        assert refused(post(client, large), 422)
        assert refused(client.get("/healthz"), 503)


# What comes together


def test_requests_that_come_together_share_a_run() -> None:
    network, seen = Colours(seconds=0.02), []

    async def many() -> list[float]:
        async with Batcher(network, most=16, seen=seen.append) as batcher:
            images = np.zeros((40, 1, 3, 32, 32), np.uint8)
            images[:, 0, 0, 0, 0] = np.arange(40)
            answers = await asyncio.gather(*map(batcher.run, images))
        return [float(logits[0, 0]) for logits, _ in answers]

    scores = asyncio.run(many())
    assert seen == [16, 16, 8]
    assert scores == sorted(scores)  # everyone got the own answer
    assert len(set(scores)) == 40


def test_a_batch_has_its_limit_and_who_has_left_is_left_out() -> None:
    network, seen = Colours(seconds=0.05), []

    async def some() -> None:
        async with Batcher(network, most=4, seen=seen.append) as batcher:
            images = np.zeros((1, 3, 32, 32), np.uint8)
            tasks = [asyncio.create_task(batcher.run(images)) for _ in range(12)]
            await asyncio.sleep(0.02)
            for task in tasks[4:8]:
                task.cancel()
            await asyncio.gather(*tasks[:4], *tasks[8:])

    asyncio.run(some())
    assert seen == [4, 4]


def test_the_network_meets_few_sizes() -> None:
    network = Colours()

    async def run(count: int) -> None:
        async with Batcher(network, most=8) as batcher:
            images = np.full((count, 3, 32, 32), 16, np.uint8)
            logits, maps = await batcher.run(images)
            assert logits.shape == (count, 3)
            assert maps.shape == (count, 3, 8, 8)
            assert (logits == 1).all()  # and none of what fills it up

    for count in range(1, 20):
        asyncio.run(run(count))
    assert set(network.sizes) == {1, 2, 4, 8}


def test_what_cannot_be_run_together_stops_nobody_else() -> None:
    async def some() -> None:
        async with Batcher(Colours()) as batcher:
            sizes = [np.zeros((1, 3, side, side), np.uint8) for side in (32, 16)]
            failed = await asyncio.gather(*map(batcher.run, sizes), return_exceptions=True)
            assert all(isinstance(error, ValueError) for error in failed)
            await asyncio.wait_for(batcher.run(sizes[0]), 10)

    asyncio.run(some())


def test_whoever_waits_when_it_stops_is_told_so() -> None:
    """One whose images are run, and two that are queued."""

    async def leave() -> list[Any]:
        async with Batcher(Colours(seconds=0.2), most=1) as batcher:
            images = np.zeros((1, 3, 32, 32), np.uint8)
            tasks = [asyncio.create_task(batcher.run(images)) for _ in range(3)]
            await asyncio.sleep(0.05)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    answers = asyncio.run(leave())
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 3


def test_beyond_its_strength_the_server_says_when_to_come_again() -> None:
    limits = Limits(requests=2)
    with TestClient(build_app(Colours(seconds=0.2), limits=limits)) as client:
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(post(client, picture()))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert post(client, picture()).status_code == 200, "and then it has room again"
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[:2] == [200, 200]
    assert set(statuses[2:]) <= {200, 429}
    turned_away = [answer for answer in answers if answer.status_code == 429]
    assert turned_away
    assert all(answer.headers["retry-after"] == "1" for answer in turned_away)


def test_bodies_held_at_the_same_time_have_a_limit() -> None:
    with TestClient(build_app(Colours(), limits=Limits(held_bytes=1000))) as client:
        assert refused(post(client, bytes(2000)), 429)
        assert post(client, picture()).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    limits = Limits(answer_seconds=0.1)
    with TestClient(build_app(Colours(seconds=0.5), limits=limits)) as client:
        assert refused(post(client, picture()), 429)


# The description


def test_the_api_keeps_to_its_own_description() -> None:
    # Many pictures: a body is refused for its commas, 413, before anyone knows whether it is valid.
    app = build_app(Colours(), limits=dataclasses.replace(SMALL, images=1000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    load_all_checks()
    # No schema can say which bytes are a picture, so most of what it allows is refused.
    unfit = {"positive_data_acceptance"}
    checks = [check for check in CHECKS.get_all() if check.__name__ not in unfit]
    asked = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:

            @settings(max_examples=10, deadline=None, derandomize=True, database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                response = case.call()
                case.validate_response(response, checks=checks)
                asked.add((case.path, response.status_code))

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a plain GET
                ask()
    assert {("/healthz", 200), ("/metrics", 200), ("/v1/predict", 422)} <= asked


def test_an_answer_keeps_to_the_description(client: TestClient) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    case = schema["/v1/predict"]["POST"].Case()
    for options in ("", "?maps=true&top=1"):
        case.validate_response(post(client, picture(), options=options))


# A real server


def connect(address: str) -> socket.socket:
    place = urlsplit(address)
    assert place.hostname
    return socket.create_connection((place.hostname, place.port or 80), timeout=20)


def request(path: str, headers: str = "", body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode() + body


def status(link: socket.socket) -> int:
    with link, http.client.HTTPResponse(link) as answer:
        answer.begin()
        return answer.status


def form(content: bytes) -> bytes:
    return FILE.replace(b"\r\n\r\nx\r\n", b"\r\n\r\n" + content + b"\r\n")


FORM = "Content-Type: multipart/form-data; boundary=x\r\n"


def test_a_body_that_drips_or_breaks_off_hurts_nobody() -> None:
    with server(body_seconds=0.5) as (process, address):
        slow = connect(address)
        slow.sendall(request("/v1/predict", FORM + "Content-Length: 1000\r\n", b"--x"))
        gone = connect(address)
        gone.sendall(request("/v1/predict", FORM + "Content-Length: 1000\r\n", b"--x"))
        gone.close()
        odd = connect(address)
        odd.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert status(odd) == 400
        assert status(slow) == 408
        assert httpx.get(address + "/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_one_who_asks_and_never_reads_is_hung_up_on() -> None:
    many = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with server(idle=0.3) as (_, address), connect(address) as link:
        link.settimeout(0.1)

        def ask(seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    link.send(many)

        with pytest.raises(ConnectionError):
            ask(60)
        assert httpx.get(address + "/healthz").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_has_begun_be_answered(number: signal.Signals) -> None:
    with server(seconds=1.0) as (process, address):
        answers: list[httpx.Response] = []
        files = {"image": ("a.png", picture())}
        ask = lambda: answers.append(httpx.post(address + "/v1/predict", files=files))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        idle = connect(address)  # one who never asks does not hold it up
        time.sleep(0.5)
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
        thread.join()
        idle.close()
    assert answers[0].status_code == 200
    assert process.returncode == 0
    assert said == "stopped\n"


def test_a_stop_ends_for_certain() -> None:
    """Also while a run of the network takes for ever."""
    with server(seconds=60, drain_seconds=0.1, end=0.2) as (process, address):
        link = connect(address)
        content = f"Content-Length: {len(body := form(picture()))}\r\n"
        link.sendall(request("/v1/predict", FORM + content, body))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        link.close()
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of open files")
def test_few_open_files_limit_connections_and_fill_no_log() -> None:
    with server(files=64) as (process, address):
        place = urlsplit(address)
        links = [socket.socket() for _ in range(200)]
        for link in links:
            link.setblocking(False)
            link.connect_ex((place.hostname, place.port))
        time.sleep(1)
        for link in links:
            link.close()
        time.sleep(0.5)
        assert httpx.get(address + "/healthz").status_code == 200
        files = {"image": ("a.png", picture())}
        assert httpx.post(address + "/v1/predict", files=files).status_code == 200
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert said == "stopped\n"


def test_the_command_serves_a_run_and_agrees_with_python(tmp_path: Path) -> None:
    network = Network("resnet8", CLASSES, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    RunDirectory(tmp_path / "run").save(
        Checkpoint(network, build("resnet8", classes=3).state_dict())
    )
    cat = tmp_path / "cat.png"
    Image.fromarray(skimage.data.chelsea()).save(cat)
    command = [sys.executable, "-m", "resnet56", "serve", "--run", "run", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = re.match(r"run: (http://127\.0\.0\.1:\d+) ", line := process.stderr.readline())
        assert found, line
        with cat.open("rb") as file:
            answer = httpx.post(found[1] + "/v1/predict?maps=true", files={"image": file}).json()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == "stopped\n"
    [expected] = load(tmp_path / "run", "cpu").predict(cat, maps=True)
    classes = answer["predictions"][0]["classes"]
    assert [one["name"] for one in classes] == list(expected.probabilities)
    shares = [one["probability"] for one in classes]
    assert shares == pytest.approx(list(expected.probabilities.values()), abs=1e-5)
    assert np.allclose(classes[0]["map"], expected.map, atol=1e-5)


@pytest.mark.skipif("resnet56" not in pretrained.names(), reason="resnet56 does not ship yet")
def test_the_shipped_network_sees_a_cat() -> None:
    cat = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(cat, "JPEG")
    with TestClient(build_app(load("resnet56", "cpu"))) as client:
        answer = post(client, cat.getvalue()).json()
    assert answer["network"] == "resnet56"
    assert answer["predictions"][0]["classes"][0]["name"] == "cat"


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("resnet56.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == (
        "resnet56: fastapi is not installed; pip install 'resnet56[serve]'\n"
    )


def test_where_it_cannot_listen_it_says_why() -> None:
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with taken, pytest.raises(UsageError, match=rf"127.0.0.1 port {port}: .*choose another --port"):
        listen("127.0.0.1", port)
    with pytest.raises(UsageError, match="--port must be from 0 to 65535"):
        listen("127.0.0.1", 99_999)
    with pytest.raises(UsageError, match="--host no.such.name.invalid"):
        listen("no.such.name.invalid", 0)
    with pytest.raises(UsageError, match=r"--host a\.\.b: "):
        listen("a..b", 0)
