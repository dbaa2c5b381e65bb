"""`dspark chat`: talk with a model over several turns."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark.commands import console as ui
from dspark.commands.console import (
    DeviceOption,
    DraftOption,
    DraftQuantOption,
    DtypeOption,
    EffortOption,
    ExactOption,
    ExpertMemoryOption,
    QuantOption,
    TargetOption,
    ThinkOption,
    ThreadsOption,
)
from dspark.commands.generate import with_model_defaults
from dspark.errors import CapabilityError, DsparkError
from dspark.request import GenerationResult, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from dspark.engine import Engine

__all__ = ["chat"]

_HELP = "/reset forgets the talk, /stats shows the last answer's figures, /save FILE, /exit"


def chat(  # noqa: PLR0913 - one parameter per option is how Typer works
    target: TargetOption = "smollm2-135m",
    draft: DraftOption = "auto",
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens per answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy (default: the model's own).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed; each turn derives its own.")
    ] = None,
    dtype: DtypeOption = "auto",
    quant: QuantOption = "none",
    draft_quant: DraftQuantOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    exact: ExactOption = None,
    expert_memory: ExpertMemoryOption = None,
    think: ThinkOption = None,
    effort: EffortOption = None,
    show_accepted: Annotated[
        bool, typer.Option("--show-accepted", help="Tint accepted draft tokens.")
    ] = False,
) -> None:
    """Chat with a model. Ctrl-C stops the answer, Ctrl-D ends the talk."""
    base = SamplingParams(
        max_tokens=max_tokens, temperature=0.0 if temperature is None else temperature, seed=seed
    )
    console = ui.stderr_console()
    engine = ui.load_engine(
        console,
        target=target,
        draft=draft,
        dtype=dtype,
        quant=quant,
        draft_quant=draft_quant,
        device=device,
        threads=threads,
        exact=exact,
        expert_memory=expert_memory,
        think=think,
        effort=effort,
        has_costs=True,
    )
    if engine.codec is None or not engine.codec.has_chat_template:
        raise CapabilityError(
            f"{target} has no chat template, so it cannot chat.", hint="use: dspark generate"
        )
    params = with_model_defaults(base, engine, {"temperature": temperature})
    Talk(engine, params, console, system=system, tint=show_accepted).run()


class Talk:
    """A conversation at the terminal.

    Args:
        engine: The engine.
        params: Sampling parameters of every turn.
        console: Where everything but the answers goes.
        system: System message, or None.
        tint: Tint accepted draft tokens.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        console: Console,
        *,
        system: str | None,
        tint: bool,
    ) -> None:
        self._engine = engine
        self._params = params
        self._console = console
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, Any]] = []
        self._last: GenerationResult | None = None
        self._tint = tint and sys.stdout.isatty()

    def run(self) -> None:
        """Read lines until the end of input."""
        if sys.stdin.isatty():
            ui.print_note(self._console, _HELP)
        while True:
            try:
                line = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                ui.print_note(self._console, "Ctrl-D or /exit ends the talk")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _read(self) -> str:
        if sys.stdin.isatty():
            return input("> ").strip()
        line = ui.read_line()
        if not line:
            raise EOFError
        return line.strip()

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._messages.clear()
            ui.print_note(self._console, "forgotten")
        elif name == "/stats":
            if self._last is None:
                ui.print_note(self._console, "no answer yet")
            else:
                ui.print_stats(self._console, self._engine, [self._last])
        elif name == "/save":
            self._save(rest.strip())
        else:
            ui.print_note(self._console, f"unknown command {name}; {_HELP}")

    def _save(self, path: str) -> None:
        if not path:
            ui.print_note(self._console, "give a file name: /save talk.json")
            return
        text = json.dumps({"messages": self._system + self._messages}, ensure_ascii=False, indent=1)
        file = Path(path).expanduser()
        temporary = file.parent / f".{file.name}.{os.getpid()}.tmp"
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(file)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            ui.print_error(self._console, f"{path} cannot be written: {exc.strerror}.")
            return
        ui.print_note(self._console, f"saved {len(self._messages)} messages to {path}")

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        turn = len(self._messages) // 2
        prompt = self._system + self._messages
        try:
            (request,) = self._engine.submit(prompt, self._turn_params(turn))
        except KeyboardInterrupt:
            self._messages.pop()
            return
        try:
            for chunk in self._engine.follow(request):
                for piece in chunk.pieces:
                    shade = self._tint and piece.is_drafted
                    sys.stdout.write(f"\x1b[32m{piece.text}\x1b[0m" if shade else piece.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            self._engine.cancel(request)
            sys.stdout.write("".join(piece.text for piece in request.pieces))
        except DsparkError as exc:
            self._messages.pop()
            ui.print_error(self._console, exc.message, exc.hint)
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._last = request.result()
        codec = self._engine.codec
        if codec is not None:  # a chat without one was refused
            message = codec.assistant_message(self._last.text, self._last.token_ids)
            self._messages.append(message)

    def _turn_params(self, turn: int) -> SamplingParams:
        """Each turn has a seed of its own, derived from the talk's."""
        from dataclasses import replace

        seed = self._params.seed
        if seed is None:
            return self._params
        return replace(self._params, seed=(seed + 0x9E3779B97F4A7C15 * (turn + 1)) % 2**64)
