"""`dspark serve`: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import ipaddress
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DraftOption,
    DraftQuantOption,
    DtypeOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThreadsOption,
)
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine, EngineConfig

__all__ = ["serve"]

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST_ALL = "*"


def serve(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    host: Annotated[str, typer.Option("--host", help="Name or address to listen at.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name in the API (default: --target).")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="DSPARK_API_KEY",
            help="A key that clients must send (repeatable; better in the environment).",
        ),
    ] = None,
    metrics_open: Annotated[
        bool, typer.Option("--metrics-open", help="Show /metrics without a key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="A host name clients may call the server by, * for any (repeatable; default: "
            "local names where it listens locally and asks for no key).",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="Let web pages of this origin in (repeatable)."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Choices that run at the same time.")
    ] = 32,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Choices that may wait; then 429.")
    ] = 64,
    max_n: Annotated[
        int, typer.Option("--max-n", min=1, help="Choices of a request: prompts times n.")
    ] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Tokens of a choice (default: the context)."),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", min=1, help="Tokens of a prompt (default: context)."),
    ] = None,
    max_body: Annotated[
        str, typer.Option("--max-body", help="Size of a request's body; then 413.")
    ] = "4MiB",
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", help="Memory for K/V, such as 8GiB (default: no limit)."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", help="Seconds for a request, its wait included.")
    ] = 600.0,
    drain_seconds: Annotated[
        float,
        typer.Option("--drain-seconds", min=0, help="Seconds to finish in after a signal to stop."),
    ] = 30.0,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    draft_quant: DraftQuantOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    auto_off: Annotated[
        bool,
        typer.Option("--auto-off/--no-auto-off", help="Let drafting switch itself off at a loss."),
    ] = True,
) -> None:
    """Serve a model over HTTP with OpenAI's API. Ctrl-C lets running requests finish."""
    _require_extra()
    from dspark.engine_config import EngineConfig
    from dspark.models.text import parse_bytes
    from dspark.serve.run import bind, run_server
    from dspark.serve.settings import ServeConfig

    keys = tuple(api_key or ())
    config = ServeConfig(
        model=_public_name(target) if name is None else name,
        api_keys=keys,
        max_queue=max_queue,
        max_body=parse_bytes(max_body),
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_choices=max_n,
        request_timeout=request_timeout,
        drain_seconds=drain_seconds,
        cors_origins=tuple(cors_origin or ()),
        hosts=_hosts(host, allow_host or [], has_keys=bool(keys)),
        is_metrics_open=metrics_open,
    )
    console = ui.stderr_console()
    if not keys and not _is_local(host):
        ui.print_note(console, "anybody who reaches this address can use it: set DSPARK_API_KEY")
    with bind(host, port) as place:
        engine = _load(
            console,
            target,
            draft,
            EngineConfig(
                max_batch=max_batch,
                auto_off=auto_off,
                memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            ),
            dtype=dtype,
            quant=quant,
            draft_quant=draft_quant,
            device=device,
            threads=threads,
            exact=exact,
            expert_memory=expert_memory,
        )
        _log_requests()
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{place.getsockname()[1]}"

        def say_ready() -> None:
            print(f"{config.model} at {url} (API: {url}/v1)", flush=True)

        is_in_order = run_server(engine, config, place, on_ready=say_ready)
    if not is_in_order:
        raise typer.Exit(130)


def _require_extra() -> None:
    try:
        import prometheus_client
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            f"dspark serve needs the package {exc.name}, which is not installed.",
            hint="pip install 'dspark[serve]'",
        ) from exc
    prometheus_client.disable_created_metrics()


def _load(  # noqa: PLR0913 - the options of an engine
    console: Console,
    target: str,
    draft: str,
    config: EngineConfig,
    *,
    dtype: str,
    quant: str,
    draft_quant: str,
    device: str,
    threads: int | None,
    exact: bool | None,
    expert_memory: str | None,
) -> Engine:
    from dspark.models.resolve import resolve_model

    resolve_model(target)
    with ui.loading(console, f"loading {target}"):
        from dspark.engine import Engine
        from dspark.eval.profile_auto import kept_or_quick

        return Engine.load(
            target=target,
            draft=draft,
            dtype=dtype,
            quant=quant,
            draft_quant=draft_quant,
            device=device,
            threads=threads,
            exact=exact,
            expert_memory=expert_memory,
            config=config,
            step_costs=kept_or_quick,
        )


def _public_name(target: str) -> str:
    """What strangers may know of a target: of a path, its last part."""
    target = target.removeprefix("hf:")
    path = Path(target).expanduser()
    return path.stem if path.suffix == ".gguf" else path.name if path.exists() else target


def _hosts(host: str, allowed: list[str], *, has_keys: bool) -> tuple[str, ...]:
    """Host names that clients may use; none for any."""
    if _HOST_ALL in allowed:
        return ()
    is_guarded = bool(allowed) or (_is_local(host) and not has_keys)
    return tuple(dict.fromkeys([*_LOCAL_NAMES, host, *allowed])) if is_guarded else ()


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _log_requests() -> None:
    """One line per request on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log = logging.getLogger("dspark.serve")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False
