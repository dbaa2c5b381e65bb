"""The ASGI application: routes, what stands before them, what they share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dspark._version import __version__
from dspark.engine import Engine
from dspark.serve.api import ChatEndpoint, CompletionEndpoint
from dspark.serve.desk import Desk
from dspark.serve.failures import ApiError, error_response
from dspark.serve.metrics import Metrics
from dspark.serve.middleware import Guard, HostCheck, KeyCheck
from dspark.serve.page import show_page
from dspark.serve.settings import ServeConfig
from dspark.serve.wire import to_json

__all__ = ["build_app"]

_PATHS = (
    "/",
    "/health",
    "/metrics",
    "/version",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
)


def build_app(engine: Engine, config: ServeConfig) -> Starlette:
    """Make the application of a server.

    It must be run with its lifespan (uvicorn does): that starts and ends the engine's thread. Its
    `state.desk` is the `Desk`.

    Args:
        engine: The engine, which is the application's own from now on.
        config: Settings.
    """
    metrics = Metrics(config.model)
    desk = Desk(engine, config, metrics)
    _add_gauges(metrics, desk)
    pages = _Pages(desk, metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        desk.worker.start()
        yield
        desk.close()

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", pages.health),
            Route("/metrics", pages.metrics),
            Route("/version", pages.version),
            Route("/v1/models", pages.models),
            Route("/v1/models/{name:path}", pages.model),
            Route("/v1/chat/completions", ChatEndpoint(desk), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(desk), methods=["POST"]),
        ],
        middleware=_middleware(config, metrics),
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.desk = desk
    return app


def _middleware(config: ServeConfig, metrics: Metrics) -> list[Middleware]:
    out = []
    if config.cors_origins:  # outermost, so that pages may read errors too
        origins = list(config.cors_origins)
        methods, headers = ["GET", "POST"], ["authorization", "content-type"]
        out.append(
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers
            )
        )
    out.append(Middleware(Guard, metrics=metrics, paths=_PATHS))
    if config.hosts:
        out.append(Middleware(HostCheck, hosts=config.hosts))
    if config.api_keys:
        open_paths = ["/", "/health", *(["/metrics"] if config.is_metrics_open else [])]
        out.append(Middleware(KeyCheck, keys=config.api_keys, open_paths=open_paths))
    return out


def _add_gauges(metrics: Metrics, desk: Desk) -> None:
    worker = desk.worker
    values: dict[str, tuple[str, Callable[[], float]]] = {
        "vllm:num_requests_running": ("Choices that run.", lambda: worker.num_running),
        "vllm:num_requests_waiting": ("Choices that wait.", lambda: worker.num_waiting),
        "dspark:cache_pages": ("Pages of K/V in use.", lambda: worker.cache_pages),
        "dspark:engine_alive": ("1 while the engine runs.", lambda: int(worker.is_alive)),
    }
    for name, (text, read) in values.items():
        metrics.gauge(name, text, read)


class _Pages:
    """The endpoints that only tell something.

    Args:
        desk: What they tell of.
        metrics: The metrics.
    """

    def __init__(self, desk: Desk, metrics: Metrics) -> None:
        self._desk = desk
        self._metrics = metrics
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are taken."""
        if self._desk.is_ready:
            return _json({"status": "ok"})
        status = "stopping" if self._desk.is_draining else "failed"
        return _json({"status": status}, status_code=503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return _json({"version": __version__})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        if request.path_params["name"] != self._desk.config.model:
            raise ApiError(
                404,
                f"that model does not exist here; there is {self._desk.config.model!r}.",
                param="model",
                code="model_not_found",
            )
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._desk.config.model,
            "object": "model",
            "created": self._started,
            "owned_by": "dspark",
            "max_model_len": self._desk.max_positions,
        }


def _json(value: dict[str, Any], *, status_code: int = 200) -> Response:
    return Response(to_json(value), status_code=status_code, media_type="application/json")


async def _http_error(request: Request, exc: Exception) -> Response:
    """An error of the router's in our shape."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    messages = {
        404: "there is nothing at this address.",
        405: "this address does not take that method.",
    }
    headers = dict(getattr(exc, "headers", None) or {})
    message = messages.get(status, "the request cannot be handled.")
    return error_response(ApiError(status, message, headers=headers))
