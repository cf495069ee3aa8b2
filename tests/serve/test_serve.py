"""The API: predictions, errors, limits, batching, its description, and a server process."""

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
from serve_fixtures import CLASSES, ColorModel, server
from serve_load import slow_jpeg

from resnet56.cli import main
from resnet56.data.images import FORMATS
from resnet56.errors import UsageError
from resnet56.model import build
from resnet56.predict import load
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.serve.app import build_app
from resnet56.serve.batching import Batcher
from resnet56.serve.limits import Limits
from resnet56.serve.schema import PredictRequest
from resnet56.serve.server import listen

with warnings.catch_warnings():  # schemathesis uses deprecated functions
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import CHECKS, load_all_checks
    from schemathesis.generation import GenerationMode
    from starlette.testclient import TestClient

SMALL = Limits(images=3, pixels=10_000, body_bytes=100_000)
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n--x--\r\n'


def encode(color: str = "red", size: tuple[int, int] = (40, 60), format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, format)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(build_app(ColorModel(), limits=SMALL), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, *files: bytes, options: str = "") -> httpx.Response:
    fields = [("image", (f"{index}.png", content)) for index, content in enumerate(files)]
    return client.post("/v1/predict" + options, files=fields)  # type: ignore[return-value]


def error_detail(response: httpx.Response, status: int) -> str:
    """Check that the response is an error with one printable line, and return the line."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    detail = response.json()["detail"]
    assert isinstance(detail, str)
    assert detail.isprintable()
    assert 0 < len(detail) < 400
    return detail


# Predictions and pages


def test_predictions_are_in_request_order(client: TestClient) -> None:
    response = post(client, encode("blue"), encode("red", format="JPEG"), options="?top=2")
    assert response.status_code == 200
    assert response.json()["model"] == "colors"
    first, second = response.json()["predictions"]
    assert first["classes"][0] == {"name": "blue", "probability": 1.0}
    assert second["classes"][0]["name"] == "red"
    assert len(second["classes"]) == 2


def test_json_and_multipart_predictions_match_the_model(client: TestClient) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    from_json = client.post("/v1/predict?maps=true", json={"images": [text]}).json()
    from_form = post(client, content.getvalue(), options="?maps=true").json()
    assert from_json == from_form
    logits, maps = ColorModel().run(pixels.transpose(2, 0, 1)[None])
    for score in from_json["predictions"][0]["classes"]:
        index = CLASSES.index(score["name"])
        assert np.allclose(score["map"], maps[0, index], atol=1e-6)
        probability = np.exp(logits[0, index]) / np.exp(logits[0]).sum()
        assert score["probability"] == pytest.approx(probability, abs=1e-6)


def test_health_metrics_and_pages_are_served(client: TestClient) -> None:
    post(client, encode())
    assert client.get("/healthz").json()["classes"] == list(CLASSES)
    metrics = client.get("/metrics").text
    assert 'resnet56_requests_total{path="/v1/predict",status="200"}' in metrics
    assert "resnet56_images_total" in metrics
    assert 'resnet56_batch_images_bucket{le="1.0"}' in metrics
    client.get("/nowhere/1")
    client.get("/nowhere/2")
    assert 'path="other",status="404"} 2.0' in client.get("/metrics").text
    for path in ("/", "/docs", "/page.css", "/page.js", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_no_page_refers_to_another_server(client: TestClient) -> None:
    for path in ("/", "/docs", "/page.css", "/page.js"):
        text = client.get(path).text.replace("http://testserver", "")
        assert "://" not in text
        assert 'src="//' not in text


def test_every_response_has_security_headers(client: TestClient) -> None:
    for response in (client.get("/"), client.get("/nowhere"), post(client), post(client, b"x")):
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_a_loopback_server_rejects_other_host_headers() -> None:
    app = build_app(ColorModel(), hosts=("localhost", "127.0.0.1"))
    with TestClient(app, base_url="http://localhost:8056") as client:
        assert client.get("/healthz").status_code == 200
        for host in ("127.0.0.1", "LOCALHOST:80"):
            assert client.get("/healthz", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "localhost:80:80", "[localhost", ""):
            error_detail(client.get("/healthz", headers={"host": host}), 400)  # type: ignore[arg-type]


# Invalid requests


def test_the_error_names_the_invalid_image(client: TestClient) -> None:
    assert "1.png" in error_detail(post(client, encode(), b"not an image"), 422)
    assert "0.png" in error_detail(post(client, encode()[:-30]), 422)


def test_a_decompression_bomb_is_rejected(client: TestClient) -> None:
    assert "10,000" in error_detail(post(client, bomb(200, 200)), 422)
    assert error_detail(post(client, bomb(60_000, 60_000)), 422)
    assert error_detail(post(client, bomb(2**31 - 1, 2**31 - 1)), 422)


def test_too_many_images_are_rejected(client: TestClient) -> None:
    assert "more than 3" in error_detail(post(client, *[encode()] * 4), 413)
    four = [base64.b64encode(encode()).decode()] * 4
    assert "more than 3" in error_detail(client.post("/v1/predict", json={"images": four}), 413)


def test_a_long_list_is_rejected_before_parsing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(_: object) -> object:
        raise AssertionError("the body was parsed")

    monkeypatch.setattr(PredictRequest, "model_validate_json", parse)
    headers = {"content-type": "application/json"}
    for content in (b'{"images": ["", "", "", "", ""]}', b"[1, 1, 1, 1, 1]"):
        response = client.post("/v1/predict", content=content, headers=headers)
        assert "more than 3" in error_detail(response, 413)  # type: ignore[arg-type]


def test_a_request_without_images_is_rejected(client: TestClient) -> None:
    assert "images" in error_detail(client.post("/v1/predict", json={"images": []}), 422)
    body = b"--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert "image" in error_detail(client.post("/v1/predict", content=body, headers=headers), 422)


def test_a_large_body_is_rejected_with_and_without_content_length(client: TestClient) -> None:
    large = bytes(200_000)
    assert error_detail(post(client, large), 413)
    chunks = (large[:1000] for _ in range(1000))  # httpx uses chunked encoding for a generator
    headers = {"content-type": "application/json"}
    assert error_detail(client.post("/v1/predict", content=chunks, headers=headers), 413)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"", 415),
        ({"content-type": "image/png"}, encode(), 415),
        ({"content-type": "image/" + "png" * 200}, b"x", 415),
        ({"content-type": "text/plain; charset=x"}, b"x", 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"x", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"y", 400),
        ({"content-type": "multipart/form-data; boundary=x; charset=undefined"}, FILE, 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n\r\n--x--", 400),
        ({"content-type": "application/json"}, b"[" * 90_000, 422),
        ({"content-type": "application/json"}, b'{"images": ["\xff"]}', 422),
        ({"content-type": "application/json"}, b'{"images": ["not base64!"]}', 422),
        ({"content-type": "application/json"}, '{"images": ["ö"]}'.encode(), 422),
        ({"content-type": "application/json"}, b'{"images": ["eA=="], "more": 1}', 422),
        ({"content-type": "application/json"}, b'{"images": ["eA=="], "\\u001b[2J": 1}', 422),
        ({"content-type": "application/json"}, b'{"' + b"more" * 200 + b'": 1}', 422),
        ({"content-type": "application/json"}, b'{"images": [{"a": 1}]}', 422),
        ({"content-type": "application/json"}, b"null", 422),
    ],
)
def test_an_invalid_request_is_rejected(
    client: TestClient, headers: dict[str, str], content: bytes, status: int
) -> None:
    assert error_detail(client.post("/v1/predict", content=content, headers=headers), status)


@pytest.mark.parametrize("field", ["picture", 'image"; x="'])
def test_an_unexpected_file_field_is_rejected(client: TestClient, field: str) -> None:
    response = client.post("/v1/predict", files=[(field, ("a.png", encode()))])
    assert "'image'" in error_detail(response, 422)  # type: ignore[arg-type]


def test_an_unexpected_text_field_is_rejected(client: TestClient) -> None:
    form = {"files": {"image": ("a.png", encode())}, "data": {"note": "x"}}
    assert "'image'" in error_detail(client.post("/v1/predict", **form), 422)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["?top=0", "?top=many", "?maps=perhaps", "?top=99999999999"])
def test_an_invalid_query_parameter_is_rejected(client: TestClient, options: str) -> None:
    name = options.strip("?").partition("=")[0]
    assert error_detail(post(client, encode(), options=options), 422).startswith(f"{name}: ")


def test_an_unprintable_or_long_file_name_is_not_repeated(
    client: TestClient,
) -> None:
    for name in ("\x1b[2Ja.png", "\u202egnp.exe", "a" * 500):
        response = client.post("/v1/predict", files=[("image", (name, b"x"))])
        assert "image 1" in error_detail(response, 422)  # type: ignore[arg-type]


def test_uploads_are_not_written_to_disk(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollover(_: object) -> None:
        raise AssertionError("an upload was written to disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    large = Limits(body_bytes=8 * 2**20)
    with TestClient(build_app(ColorModel(), limits=large)) as client:
        assert post(client, encode() + bytes(6 * 2**20)).status_code == 200


def test_an_exception_is_logged_but_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ColorModel):
        def run(self, images: Any) -> Any:
            raise RuntimeError("secret details")

    with TestClient(build_app(Broken())) as client:
        assert "secret" not in error_detail(post(client, encode()), 500)
        assert client.get("/healthz").status_code == 200
    assert "secret details" in caplog.text


# Limits on decoding


LARGE = dataclasses.replace(SMALL, pixels=10**8, body_bytes=10**8)


def test_decoding_has_a_deadline() -> None:
    limits = dataclasses.replace(LARGE, decode_seconds=0.5)
    large = slow_jpeg()
    with TestClient(build_app(ColorModel(), limits=limits)) as client:
        for _ in range(3):  # more than the number of processes
            assert "longer than 0.5 seconds" in error_detail(post(client, large), 422)
        assert post(client, encode("blue")).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
def test_decoding_has_a_memory_limit() -> None:
    limits = dataclasses.replace(LARGE, decode_bytes=30 * 2**20)
    large = encode(size=(5000, 5000))
    with TestClient(build_app(ColorModel(), limits=limits)) as client:
        for _ in range(3):
            assert "more than 30 MiB" in error_detail(post(client, large), 422)
        assert post(client, encode("blue")).status_code == 200


def test_a_crashed_decoder_is_replaced() -> None:
    app = build_app(ColorModel())
    with TestClient(app) as client:
        for _ in range(2):
            for child in psutil.Process().children():
                if "decode_worker" in " ".join(child.cmdline()):
                    child.kill()
                    child.wait()
            assert post(client, encode("blue")).status_code == 200


def test_other_formats_require_an_option(client: TestClient) -> None:
    tiff = encode(format="TIFF")
    assert "not an image in a supported format" in error_detail(post(client, tiff), 422)
    with TestClient(build_app(ColorModel(), limits=Limits(formats=FORMATS))) as permissive:
        assert post(permissive, tiff).status_code == 200


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
def test_a_cross_site_post_is_rejected(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    files = {"image": ("a.png", encode())}
    response = client.post("/v1/predict", files=files, headers=headers)
    assert response.status_code == status
    assert (
        client.get("/healthz", headers=headers).status_code == 200
    )  # a link from another site is allowed


def test_the_health_check_fails_while_requests_stall() -> None:
    limits = dataclasses.replace(SMALL, stall_seconds=0.2)
    with TestClient(build_app(ColorModel(seconds=1.0), limits=limits)) as client:
        assert client.get("/healthz").status_code == 200
        thread = threading.Thread(target=post, args=(client, encode()))
        thread.start()
        time.sleep(0.6)
        assert "cannot classify images now" in error_detail(client.get("/healthz"), 503)
        thread.join()
        assert client.get("/healthz").status_code == 200


def test_the_health_check_fails_without_running_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    large = slow_jpeg()
    limits = dataclasses.replace(LARGE, decode_seconds=0.2, decoders=1)
    with TestClient(build_app(ColorModel(), limits=limits)) as client:
        monkeypatch.setattr(sys, "executable", "/nonexistent")
        assert error_detail(post(client, large), 422)
        assert error_detail(client.get("/healthz"), 503)


# Batching and concurrency


def test_concurrent_requests_share_a_batch() -> None:
    model = ColorModel(seconds=0.02)
    batch_sizes: list[int] = []

    async def run_all() -> list[float]:
        async with Batcher(model, max_batch=16, on_batch=batch_sizes.append) as batcher:
            images = np.zeros((40, 1, 3, 32, 32), np.uint8)
            images[:, 0, 0, 0, 0] = np.arange(40)
            results = await asyncio.gather(*map(batcher.run, images))
        return [float(logits[0, 0]) for logits, _ in results]

    scores = asyncio.run(run_all())
    assert batch_sizes == [16, 16, 8]
    assert scores == sorted(scores)  # each request got its own result
    assert len(set(scores)) == 40


def test_the_batch_size_is_limited_and_excludes_canceled_requests() -> None:
    model = ColorModel(seconds=0.05)
    batch_sizes: list[int] = []

    async def some() -> None:
        async with Batcher(model, max_batch=4, on_batch=batch_sizes.append) as batcher:
            images = np.zeros((1, 3, 32, 32), np.uint8)
            tasks = [asyncio.create_task(batcher.run(images)) for _ in range(12)]
            await asyncio.sleep(0.02)
            for task in tasks[4:8]:
                task.cancel()
            await asyncio.gather(*tasks[:4], *tasks[8:])

    asyncio.run(some())
    assert batch_sizes == [4, 4]


def test_batches_are_padded_to_powers_of_two() -> None:
    model = ColorModel()

    async def run(count: int) -> None:
        async with Batcher(model, max_batch=8) as batcher:
            images = np.full((count, 3, 32, 32), 16, np.uint8)
            logits, maps = await batcher.run(images)
            assert logits.shape == (count, 3)
            assert maps.shape == (count, 3, 8, 8)
            assert (logits == 1).all()  # the results do not include the padding

    for count in range(1, 20):
        asyncio.run(run(count))
    assert set(model.sizes) == {1, 2, 4, 8}


def test_a_failed_batch_does_not_affect_the_next_batch() -> None:
    async def some() -> None:
        async with Batcher(ColorModel()) as batcher:
            incompatible = [np.zeros((1, 3, side, side), np.uint8) for side in (32, 16)]
            errors = await asyncio.gather(*map(batcher.run, incompatible), return_exceptions=True)
            assert all(isinstance(error, ValueError) for error in errors)
            await asyncio.wait_for(batcher.run(incompatible[0]), 10)

    asyncio.run(some())


def test_stopping_cancels_pending_requests() -> None:
    """One request is running and two are queued."""

    async def stop_early() -> list[Any]:
        async with Batcher(ColorModel(seconds=0.2), max_batch=1) as batcher:
            images = np.zeros((1, 3, 32, 32), np.uint8)
            tasks = [asyncio.create_task(batcher.run(images)) for _ in range(3)]
            await asyncio.sleep(0.05)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    results = asyncio.run(stop_early())
    assert [type(result) for result in results] == [asyncio.CancelledError] * 3


def test_too_many_requests_get_429_with_retry_after() -> None:
    limits = Limits(requests=2)
    with TestClient(build_app(ColorModel(seconds=0.2), limits=limits)) as client:
        responses: list[httpx.Response] = []
        send = lambda: responses.append(post(client, encode()))  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert post(client, encode()).status_code == 200  # the server accepts requests again
    statuses = sorted(response.status_code for response in responses)
    assert statuses[:2] == [200, 200]
    assert set(statuses[2:]) <= {200, 429}
    rejected = [response for response in responses if response.status_code == 429]
    assert rejected
    assert all(response.headers["retry-after"] == "1" for response in rejected)


def test_buffered_bodies_have_a_limit() -> None:
    with TestClient(build_app(ColorModel(), limits=Limits(buffered_bytes=1000))) as client:
        assert error_detail(post(client, bytes(2000)), 429)
        assert post(client, encode()).status_code == 200


def test_a_slow_prediction_times_out() -> None:
    limits = Limits(answer_seconds=0.1)
    with TestClient(build_app(ColorModel(seconds=0.5), limits=limits)) as client:
        assert error_detail(post(client, encode()), 429)


# The OpenAPI description


def test_the_api_conforms_to_its_description() -> None:
    # The limit on images is high, because a body with many commas is otherwise rejected with 413.
    app = build_app(ColorModel(), limits=dataclasses.replace(SMALL, images=1000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    load_all_checks()
    # A schema cannot specify which bytes are an image, so the server rejects most valid bodies.
    excluded = {"positive_data_acceptance"}
    checks = [check for check in CHECKS.get_all() if check.__name__ not in excluded]
    covered = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:

            @settings(max_examples=10, deadline=None, derandomize=True, database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                response = case.call()
                case.validate_response(response, checks=checks)
                covered.add((case.path, response.status_code))

            with contextlib.suppress(Unsatisfiable):  # a GET without parameters cannot be invalid
                check()
    assert {("/healthz", 200), ("/metrics", 200), ("/v1/predict", 422)} <= covered


def test_a_prediction_conforms_to_the_description(client: TestClient) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    case = schema["/v1/predict"]["POST"].Case()
    for options in ("", "?maps=true&top=1"):
        case.validate_response(post(client, encode(), options=options))


# A server process


def connect(address: str) -> socket.socket:
    url = urlsplit(address)
    assert url.hostname
    return socket.create_connection((url.hostname, url.port or 80), timeout=20)


def request(path: str, headers: str = "", body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode() + body


def status(connection: socket.socket) -> int:
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status


def form(content: bytes) -> bytes:
    return FILE.replace(b"\r\n\r\nx\r\n", b"\r\n\r\n" + content + b"\r\n")


FORM = "Content-Type: multipart/form-data; boundary=x\r\n"


def test_slow_aborted_and_invalid_requests_do_not_affect_others() -> None:
    with server(body_seconds=0.5) as (process, address):
        slow = connect(address)
        slow.sendall(request("/v1/predict", FORM + "Content-Length: 1000\r\n", b"--x"))
        aborted = connect(address)
        aborted.sendall(request("/v1/predict", FORM + "Content-Length: 1000\r\n", b"--x"))
        aborted.close()
        invalid = connect(address)
        invalid.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert status(invalid) == 400
        assert status(slow) == 408
        assert httpx.get(address + "/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in output


def test_a_client_that_never_reads_is_disconnected() -> None:
    pipelined = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with server(idle=0.3) as (_, address), connect(address) as connection:
        connection.settimeout(0.1)

        def send_for(seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection.send(pipelined)

        with pytest.raises(ConnectionError):
            send_for(60)
        assert httpx.get(address + "/healthz").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_requests_in_flight(number: signal.Signals) -> None:
    with server(seconds=1.0) as (process, address):
        responses: list[httpx.Response] = []
        files = {"image": ("a.png", encode())}
        send = lambda: responses.append(  # noqa: E731
            httpx.post(address + "/v1/predict", files=files)
        )
        thread = threading.Thread(target=send)
        thread.start()
        idle = connect(address)  # an idle connection does not delay the shutdown
        time.sleep(0.5)
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        thread.join()
        idle.close()
    assert responses[0].status_code == 200
    assert process.returncode == 0
    assert output == "stopped\n"


def test_the_server_exits_after_the_drain_time() -> None:
    """The model may still be running."""
    with server(seconds=60, drain_seconds=0.1, exit=0.2) as (process, address):
        connection = connect(address)
        content = f"Content-Length: {len(body := form(encode()))}\r\n"
        connection.sendall(request("/v1/predict", FORM + content, body))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        connection.close()
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on open files")
def test_a_low_file_limit_reduces_the_number_of_connections() -> None:
    with server(files=64) as (process, address):
        url = urlsplit(address)
        connections = [socket.socket() for _ in range(200)]
        for connection in connections:
            connection.setblocking(False)
            connection.connect_ex((url.hostname, url.port))
        time.sleep(0.5)
        for connection in connections:
            connection.close()
        assert httpx.get(address + "/healthz").status_code == 200
        files = {"image": ("a.png", encode())}
        assert httpx.post(address + "/v1/predict", files=files).status_code == 200
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert output == "stopped\n"


def test_the_command_serves_a_run_and_matches_python(tmp_path: Path) -> None:
    config = ModelConfig("resnet8", CLASSES, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    RunDirectory(tmp_path / "run").save(
        Checkpoint(config, build("resnet8", classes=3).state_dict())
    )
    cat = tmp_path / "cat.png"
    Image.fromarray(skimage.data.chelsea()).save(cat)
    command = [sys.executable, "-m", "resnet56", "serve", "--run", "run", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = process.stderr.readline()
        address = re.match(r"serving run on (http://127\.0\.0\.1:\d+) ", line)
        assert address, line
        with cat.open("rb") as file:
            url = address[1] + "/v1/predict?maps=true"
            response = httpx.post(url, files={"image": file}).json()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == "stopped\n"
    [expected] = load(tmp_path / "run", "cpu").predict(cat, maps=True)
    classes = response["predictions"][0]["classes"]
    assert [score["name"] for score in classes] == list(expected.probabilities)
    probabilities = [score["probability"] for score in classes]
    assert probabilities == pytest.approx(list(expected.probabilities.values()), abs=1e-5)
    assert np.allclose(classes[0]["map"], expected.map, atol=1e-5)


def test_the_pretrained_model_recognizes_a_cat() -> None:
    cat = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(cat, "JPEG")
    with TestClient(build_app(load("resnet56", "cpu"))) as client:
        response = post(client, cat.getvalue()).json()
    assert response["model"] == "resnet56"
    assert response["predictions"][0]["classes"][0]["name"] == "cat"


def test_the_error_about_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("resnet56.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == (
        "resnet56: fastapi is not installed; pip install 'resnet56[serve]'\n"
    )


def test_errors_about_the_address_have_one_line() -> None:
    occupied = listen("127.0.0.1", 0)
    port = occupied.getsockname()[1]
    with (
        occupied,
        pytest.raises(UsageError, match=rf"127.0.0.1 port {port}: .*choose another port"),
    ):
        listen("127.0.0.1", port)
    with pytest.raises(UsageError, match="the port must be from 0 to 65535"):
        listen("127.0.0.1", 99_999)
    with pytest.raises(UsageError, match="cannot resolve the host name no.such.name.invalid"):
        listen("no.such.name.invalid", 0)
    with pytest.raises(UsageError, match=r"a\.\.b is not a valid host name"):
        listen("a..b", 0)
