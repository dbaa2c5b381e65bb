"""Runs the application: uvicorn, and a drain in the place of its way to stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from dspark.engine import Engine
from dspark.errors import ConfigError
from dspark.serve.app import build_app
from dspark.serve.desk import Desk
from dspark.serve.settings import ServeConfig

__all__ = ["Server", "bind", "make_server", "run_server"]

_CLOSE_SECONDS = 5
"""Seconds that connections have to close after the drain."""

_KEEP_ALIVE = 30
"""Seconds that an idle connection is kept."""


def bind(host: str, port: int) -> socket.socket:
    """Take a place to listen at; nobody can connect before the server runs.

    Args:
        host: Name or address.
        port: Port, 0 for a free one.

    Raises:
        ConfigError: If it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        place = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"{host} port {port} is no place to listen at.") from exc
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as exc:
        place.close()
        raise ConfigError(
            f"cannot listen at {host} port {port}: {exc.strerror}.",
            hint="another program may be using it: try another --port, or 0 for a free one",
        ) from exc
    return place


class Server(uvicorn.Server):
    """uvicorn's server, which drains when it is told to stop.

    The first signal ends the taking in of requests and lets those under way finish; the second one
    ends everything.

    Args:
        config: uvicorn's settings.
        desk: Takes the requests in.
        on_ready: Called once requests can come.
    """

    def __init__(
        self, config: uvicorn.Config, desk: Desk, on_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        self._desk = desk
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self._on_ready is not None and not self.should_exit:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._drain is not None or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        """Take no more requests, and stop when those under way are done."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._stop_gently())

    async def _stop_gently(self) -> None:
        await self._desk.drain(self._desk.config.drain_seconds)
        self.should_exit = True


def run_server(
    engine: Engine,
    config: ServeConfig,
    place: socket.socket,
    *,
    on_ready: Callable[[], None] | None = None,
) -> bool:
    """Serve until a signal comes.

    Args:
        engine: The engine.
        config: Settings.
        place: Where to listen, from `bind`.
        on_ready: Called once requests can come.

    Returns:
        True if everything that was under way could finish or be ended in order.
    """
    server = make_server(engine, config, on_ready=on_ready)
    server.run(sockets=[place])
    return not server.force_exit


def make_server(
    engine: Engine, config: ServeConfig, *, on_ready: Callable[[], None] | None = None
) -> Server:
    """The server, not running yet."""
    app = build_app(engine, config)
    settings = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return Server(settings, app.state.desk, on_ready)
