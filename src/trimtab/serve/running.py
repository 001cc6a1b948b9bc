"""Running the application until it is told to end."""

from __future__ import annotations

import contextlib
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from trimtab.engine.remembered import few_shapes_remembered
from trimtab.serve.engine import Engine

GRACE_SECONDS = 5
"""How long open connections have to take what is still sent to them."""


class Host(uvicorn.Server):
    """A server whose engine stops with the first signal, so that no stream keeps it alive."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.stopping = True  # a signal may come while the engine's lock is held: only this is safe here
        super().handle_exit(sig, frame)


def host(app: Starlette, engine: Engine, *, connections: int = 320) -> Host:
    """A server for the application; `connections` is how many may be open at a time."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Host(config, engine)


def run(app: Starlette, engine: Engine, listener: socket.socket, *, connections: int) -> None:
    """Serve until Ctrl-C or a signal to end; returns when the engine has stopped."""
    few_shapes_remembered()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            host(app, engine, connections=connections).run(sockets=[listener])
    finally:
        engine.stop()
