"""The API: what is at which address."""

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
from resnet56.serve.docs import chapters
from resnet56.serve.front import CrossSite, Front, Hosts
from resnet56.serve.limits import Limits
from resnet56.serve.meter import Meter
from resnet56.serve.schema import Answer, Health, Pictures, Problem
from resnet56.serve.service import Service
from resnet56.serve.uploads import FIELD, JSON, MULTIPART, complaint

HERE = Path(__file__).parent

BODY = {
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
                        "description": "Picture files (PNG, JPEG, WebP, ...); repeat the field "
                        "for several.",
                    }
                },
            }
        },
        JSON: {"schema": Pictures.model_json_schema()},
    },
}

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "The body is not valid multipart/form-data, or the Host header names another server",
        403: "The request comes from a page of another site",
        408: "The body took too long to arrive",
        413: "The body is too large, or has too many pictures",
        415: "The body is of another type",
        422: "A picture cannot be read, is too large or takes too long to decode, or an option is "
        "out of range",
        429: "Too many requests in flight; retry after the time in Retry-After",
    }.items()
}


def build_app(
    predictor: Predictor, *, limits: Limits | None = None, hosts: Collection[str] = ("*",)
) -> FastAPI:
    """The application around a network.

    Args:
        predictor: called from one thread only.
        limits: what a client may ask for.
        hosts: names in the Host header that are answered, "*" for all; on a loopback address they
            keep other sites from reaching the server through a name of theirs (DNS rebinding).
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
        summary="Classes of pictures, and where in the picture they are seen",
        description=_about(predictor, limits),
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own come from a CDN
        redoc_url=None,
    )
    _add_api(app, service, meter)
    _add_pages(app, predictor, limits)
    app.add_exception_handler(RequestValidationError, _refuse_options)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_middleware(CrossSite)
    app.add_middleware(Hosts, names=hosts)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Front, meter=meter, paths=paths)
    return app


def _about(predictor: Predictor, limits: Limits) -> str:
    return (
        f"The network {predictor.name} knows {len(predictor.classes)} classes and always answers "
        f"with one of them: {', '.join(predictor.classes)}. It looks at the centre square of a "
        f"picture, at 32 by 32 pixels. A request has at most {limits.images} pictures and "
        f"{limits.body_bytes / 2**20:g} MiB, a picture at most "
        f"{limits.pixels / 1e6:g} million pixels. It reads {', '.join(limits.formats)}; decoding a "
        f"picture may take {limits.decode_seconds:g} seconds. Pictures are not kept."
    )


def _add_api(app: FastAPI, service: Service, meter: Meter) -> None:
    predictor = service.predictor

    @app.post(
        "/v1/predict",
        summary="Classify pictures",
        response_model_exclude_none=True,
        responses=REFUSALS,
        openapi_extra={"requestBody": BODY},
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name.")] = 3,
        maps: Annotated[bool, Query(description="Whether to add their maps.")] = False,
    ) -> Answer:
        """Every picture gets the likeliest classes with their probabilities.

        If one picture of several cannot be read, none is answered, and the answer names it.
        """
        return await service.answer(request, top, maps)

    @app.get(
        "/healthz",
        summary="Is it up?",
        responses={503: {"model": Problem, "description": "No picture can be classified now"}},
    )
    async def healthz() -> Health:
        """Answers with 200 while pictures can be classified, else with 503."""
        if not service.ready:
            raise HTTPException(503, "no picture can be classified now; requests are waiting")
        classes = list(predictor.classes)
        return Health(status="ok", network=predictor.name, classes=classes, version=__version__)

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Requests by path and status, pictures, sizes of batches, time, memory."""
        return Response(meter.page(), media_type=meter.content_type)


def _add_pages(app: FastAPI, predictor: Predictor, limits: Limits) -> None:
    """The page, the description, and what they load: all of it from here."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )

    def add(path: str, render: Callable[[Request], str], media_type: str) -> None:
        async def show(request: Request) -> Response:
            return Response(render(request), media_type=media_type)

        app.add_route(path, show, include_in_schema=False)

    def index(_: Request) -> str:
        return templates.get_template("index.html.j2").render(
            network=predictor.name, classes=predictor.classes, limits=limits
        )

    def docs(request: Request) -> str:
        description = app.openapi()
        return templates.get_template("docs.html.j2").render(
            info=description["info"],
            chapters=chapters(description),
            address=str(request.base_url).rstrip("/"),
        )

    css, js = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    add("/", index, "text/html")
    add("/docs", docs, "text/html")
    add("/page.css", lambda _: css, "text/css")
    add("/page.js", lambda _: js, "text/javascript")


async def _refuse_options(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": complaint(error.errors())}, 422)


async def _nobody_there(_: Request, error: Exception) -> Response:
    """The client left while it was sending; nobody reads this, but it is counted."""
    return JSONResponse({"detail": "the request broke off"}, 400)
