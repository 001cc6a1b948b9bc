"""`trimtab serve`: one model with many adapters behind an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import click

from trimtab.cli.verb import Verb, counted, say
from trimtab.core.errors import UserError, listing

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command(cls=Verb, name="serve", short_help="Serve a model and its adapters over HTTP.")
@click.argument("model", metavar="MODEL")
@click.option("--adapter", "named", multiple=True, metavar="NAME=DIR", help="A run or adapter, by the name to ask for.")
@click.option(
    "--adapters", type=click.Path(path_type=Path), metavar="DIR", help="Serve every run and adapter in a directory."
)
@click.option("--name", help="What the base model is called; without it, the last part of MODEL.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--token", envvar="TRIMTAB_TOKEN", help="Ask for this bearer token; also read from TRIMTAB_TOKEN.")
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Requests that run at a time.")
@click.option("--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--max-body", type=click.IntRange(min=1024), default=1 << 20, show_default=True, help="Most bytes of a request."
)
@click.option(
    "--dtype", default="auto", show_default=True, help="Type of the weights: that of the first run, else auto."
)
@click.option(
    "--quantize", help="Store the base in this format: nf4, nf4-double, ...; else as all its runs were tuned."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
def command(
    model: str,
    named: tuple[str, ...],
    adapters: Path | None,
    name: str | None,
    host: str,
    port: int,
    token: str | None,
    rows: int,
    queue: int,
    max_tokens: int,
    max_body: int,
    dtype: str,
    quantize: str | None,
    device: str,
) -> dict[str, Any]:
    """Answer OpenAI's /v1/chat/completions and /v1/completions with MODEL and its adapters.

    A request names an adapter as its `model`, or the base by its own name. Requests for different adapters run in one
    batch. Ctrl-C ends the server.
    """
    require_packages()
    if token == "":
        raise UserError("serve: the token is empty, which would let everyone in", fix="leave --token out, or give one")
    wanted = directories(named, adapters)

    from trimtab.serve.application import Limits, application
    from trimtab.serve.engine import Engine
    from trimtab.serve.opening import open_served
    from trimtab.serve.running import run

    listener = listening(host, port)
    with listener:
        served = open_served(model, wanted, base_name=name, dtype=dtype, device=device, quantize=quantize)
        engine = Engine(served.model, served.tokenizer, rows=rows, queue=queue)
        hosts = LOCAL if host in LOCAL else ("*",)
        app = application(served, engine, token=token, limits=Limits(max_body, max_tokens), hosts=(*hosts, "[::1]"))
        if host not in LOCAL and token is None:
            say(f"warning: {host} can be reached from outside and no --token is asked for", err=True)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        say(f"{counted(len(served.names), 'model')} at {address}/v1: {listing(served.names)}\nCtrl-C ends")
        run(app, engine, listener, connections=4 * (rows + queue))
    say("stopped")
    return {"address": address, "models": list(served.names)}


def require_packages() -> None:
    """The server's packages, which are an extra."""
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"serve: {listing(missing)} is not installed", fix="pip install 'trimtab[serve]'")


def directories(named: tuple[str, ...], folder: Path | None) -> dict[str, Path]:
    """Name -> directory of every adapter asked for."""
    from trimtab.serve.opening import found_in

    found = found_in(folder) if folder is not None else {}
    for item in named:
        name, equals, directory = item.partition("=")
        if not equals or not name or not directory:
            raise UserError(f"serve: --adapter {item!r} is not NAME=DIR", fix="--adapter mine=runs/my-run")
        if name in found:
            raise UserError(f"serve: {name} names two adapters", fix="--adapter OTHERNAME=DIR")
        found[name] = Path(directory)
    return found


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens: before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"serve: cannot listen at {host} port {port}: {error.strerror or error}", fix="--port 0 takes a free one"
        ) from None
    return listener
