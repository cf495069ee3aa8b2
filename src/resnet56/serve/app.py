"""The FastAPI application: API endpoints and pages."""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from resnet56 import __version__
from resnet56.serve.batching import Predictor
from resnet56.serve.docs import operations
from resnet56.serve.limits import Limits
from resnet56.serve.meter import Meter
from resnet56.serve.middleware import CrossSiteMiddleware, HostMiddleware, ResponseMiddleware
from resnet56.serve.schema import ErrorResponse, HealthResponse, PredictRequest, PredictResponse
from resnet56.serve.service import Service
from resnet56.serve.uploads import FIELD, JSON, MULTIPART, validation_message

TEMPLATES = Path(__file__).parent

REQUEST_BODY = {
    "required": True,
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "additionalProperties": False,
                "properties": {
                    FIELD: {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "string", "format": "binary"},
                        "description": "Image files (PNG, JPEG, WebP, ...). Repeat the field to "
                        "send several images.",
                    }
                },
            }
        },
        JSON: {"schema": PredictRequest.model_json_schema()},
    },
}

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The body is not valid multipart/form-data, or the Host header is not allowed.",
        403: "The request comes from a page on another site.",
        408: "The body took too long to arrive.",
        413: "The body is too large or contains too many images.",
        415: "The media type or the content encoding of the body is not supported.",
        422: "An image cannot be read, is too large or takes too long to decode, or a parameter is "
        "out of range.",
        429: "Too many requests are in flight. Retry after the time in the Retry-After header.",
    }.items()
}


def build_app(
    predictor: Predictor, *, limits: Limits | None = None, hosts: Collection[str] = ("*",)
) -> FastAPI:
    """Build the application that serves a model.

    Args:
        predictor: the model. All calls to its `run` method come from one thread.
        limits: limits on requests.
        hosts: accepted host names in the Host header. "*" accepts all names. On a loopback
            address, a list of allowed names protects the server from DNS rebinding.
    """
    limits = limits or Limits()
    meter = Meter()
    service = Service(predictor, limits, meter)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title="resnet56",
        summary="Image classification with class activation maps",
        description=_description(predictor, limits),
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's documentation pages load scripts from a CDN.
        redoc_url=None,
    )
    _add_api(app, service, meter)
    _add_pages(app, predictor, limits)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_middleware(CrossSiteMiddleware)
    app.add_middleware(HostMiddleware, names=hosts)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(ResponseMiddleware, meter=meter, paths=paths)
    return app


def _description(predictor: Predictor, limits: Limits) -> str:
    return (
        f"The model {predictor.name} has {len(predictor.classes)} classes and always predicts one "
        f"of them: {', '.join(predictor.classes)}. The model uses only the center square of an "
        f"image, resized to 32x32 pixels. A request can contain up to {limits.images} images and "
        f"can be up to {limits.body_bytes / 2**20:g} MiB in size. An image can have up to "
        f"{limits.pixels / 1e6:g} million pixels. The supported formats are "
        f"{', '.join(limits.formats)}. The time limit for decoding an image is "
        f"{limits.decode_seconds:g} seconds. The server does not store images."
    )


def _add_api(app: FastAPI, service: Service, meter: Meter) -> None:
    predictor = service.predictor

    @app.post(
        "/v1/predict",
        summary="Classify images",
        response_model_exclude_none=True,
        responses=ERROR_RESPONSES,
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="Number of classes to return.")] = 3,
        maps: Annotated[
            bool, Query(description="Include class activation maps in the response.")
        ] = False,
    ) -> PredictResponse:
        """Return the most probable classes of each image with their probabilities.

        If one image cannot be read, the request fails, and the error names the image.
        """
        return await service.predict(request, top, maps)

    @app.get(
        "/healthz",
        summary="Health check",
        responses={
            503: {"model": ErrorResponse, "description": "The server cannot classify images now."}
        },
    )
    async def healthz() -> HealthResponse:
        """Return 200 if the server can classify images, and 503 otherwise."""
        if not service.ready:
            raise HTTPException(503, "the server cannot classify images now; retry later")
        classes = list(predictor.classes)
        return HealthResponse(
            status="ok", model=predictor.name, classes=classes, version=__version__
        )

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Return request counts, response times, image counts, batch sizes and memory usage."""
        return Response(meter.render(), media_type=meter.content_type)


def _add_pages(app: FastAPI, predictor: Predictor, limits: Limits) -> None:
    """Add the demo page and the API reference, with their styles and scripts."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )

    def add(path: str, render: Callable[[Request], str], media_type: str) -> None:
        async def endpoint(request: Request) -> Response:
            return Response(render(request), media_type=media_type)

        app.add_route(path, endpoint, include_in_schema=False)

    def index(_: Request) -> str:
        return templates.get_template("index.html.j2").render(
            name=predictor.name, classes=predictor.classes, limits=limits
        )

    def docs(request: Request) -> str:
        description = app.openapi()
        return templates.get_template("docs.html.j2").render(
            info=description["info"],
            operations=operations(description),
            base_url=str(request.base_url).rstrip("/"),
        )

    css, js = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    add("/", index, "text/html")
    add("/docs", docs, "text/html")
    add("/page.css", lambda _: css, "text/css")
    add("/page.js", lambda _: js, "text/javascript")


async def _handle_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": validation_message(error.errors())}, 422)


async def _handle_disconnect(_: Request, error: Exception) -> Response:
    """Return a response that is only recorded in the metrics, because the client disconnected."""
    return JSONResponse({"detail": "the client disconnected"}, 400)
