"""From what a user asks for to configurations, prompts and the key of a benchmark."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dspark.engine import Engine
from dspark.errors import ConfigError, DsparkError
from dspark.eval.bench import Contestant
from dspark.eval.log import settings_key
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.results import describe_model, describe_params
from dspark.eval.runner import load_drafts, question_seed
from dspark.eval.runners.base import BenchRequest
from dspark.eval.runners.own import OwnRunner
from dspark.models.resolve import resolve_model
from dspark.request import SamplingParams

__all__ = [
    "NONE",
    "Servers",
    "Setup",
    "bench_key",
    "bench_requests",
    "other_contestants",
    "own_contestants",
    "pick_baseline",
    "server_contestants",
]

NONE = "none"
"""Name of plain decoding."""

_SPEC = re.compile(r"(transformers|llama\.cpp)(?::(\w+))?(?:=(.+))?")
_SPECS = (
    "transformers, transformers:lookup, transformers:assisted=MODEL, llama.cpp=FILE.gguf or "
    "llama.cpp:lookup=FILE.gguf"
)
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all configurations have in common.

    Attributes:
        engine: The loaded target.
        target: The target as the user named it.
        dtype: As --dtype.
        device: As --device.
        params: Sampling parameters.
        requests: The prompts.
        is_raw: No chat template.
        think: Thinking asked for, forbidden, or left to the model (None).
        auto_off: Let drafting switch itself off while it loses.
    """

    engine: Engine
    target: str
    dtype: str
    device: str
    params: SamplingParams
    requests: Sequence[BenchRequest]
    is_raw: bool = False
    think: bool | None = None
    auto_off: bool = True


def bench_requests(
    engine: Engine, prompts: PromptSet, *, seed: int, is_raw: bool
) -> list[BenchRequest]:
    """The first turn of every question, as text and as the target's token ids.

    Args:
        engine: The target's engine.
        prompts: The prompt set.
        seed: The run's seed.
        is_raw: No chat template.

    Raises:
        DsparkError: If a question cannot be encoded; the message names it.
    """
    return [
        BenchRequest(
            question_id=question.question_id,
            category=question.category,
            text=question.turns[0],
            token_ids=_encode(engine, question, is_raw=is_raw),
            seed=question_seed(seed, question.question_id),
        )
        for question in prompts.questions
    ]


def _encode(engine: Engine, question: Question, *, is_raw: bool) -> tuple[int, ...]:
    codec = engine.codec
    if codec is None:
        raise ConfigError(
            f"{engine.target.info.name} has no tokenizer, so it cannot be given prompts of text."
        )
    text = question.turns[0]
    try:
        if is_raw:
            return tuple(codec.encode(text))
        return tuple(codec.encode_chat([{"role": "user", "content": text}]))
    except DsparkError as exc:
        raise type(exc)(f"question {question.question_id}: {exc.message}", hint=exc.hint) from exc


# -- dspark's own -----------------------------------------------------------------------------


def own_contestants(
    setup: Setup,
    drafts: Sequence[str],
    *,
    widths: Sequence[int] = (),
    budgets: Sequence[int] = (),
    loaded: str | None = None,
) -> list[Contestant]:
    """Every draft with every width and tree budget; plain decoding once.

    Args:
        setup: What all have in common.
        drafts: As --draft.
        widths: Children per node; none leaves it to the draft.
        budgets: Drafted nodes per round; none leaves it to the engine.
        loaded: The draft that `setup.engine` has already, or None.

    Raises:
        DsparkError: If a draft cannot be loaded.
    """
    found = []
    for draft in dict.fromkeys(drafts):
        engine = setup.engine
        if draft != loaded:
            engine = load_drafts(
                engine, setup.target, draft, dtype=setup.dtype, device=setup.device
            )
        shapes = [(None, None)] if draft == NONE else _shapes(widths, budgets)
        found += [_own(setup, engine, draft, width, budget) for width, budget in shapes]
    return found


def _shapes(widths: Sequence[int], budgets: Sequence[int]) -> list[tuple[int | None, int | None]]:
    return list(itertools.product(widths or (None,), budgets or (None,)))


def _own(
    setup: Setup, engine: Engine, draft: str, width: int | None, budget: int | None
) -> Contestant:
    described = describe_model(draft)
    name = str(described["id"])
    name += "" if width is None else f" width {width}"
    name += "" if budget is None else f" budget {budget}"
    drafter = engine.drafter.name
    params = replace(setup.params, width=width, tree_budget=budget)
    return Contestant(
        name=name,
        kind="dspark",
        runner=OwnRunner(
            engine,
            params,
            auto_off=setup.auto_off,
            note=f"auto took {drafter}" if draft == "auto" else None,
        ),
        params=params,
        facts={"draft": described["id"], "is_exact": engine.target.exactness.enabled},
        identity={"draft": described, "drafter": drafter, "auto_off": setup.auto_off},
    )


# -- other programs ---------------------------------------------------------------------------


def other_contestants(setup: Setup, specs: Sequence[str]) -> list[Contestant]:
    """Contestants for transformers and llama.cpp, as --runner names them.

    Raises:
        ConfigError: If a name is not known, or lacks its model.
    """
    parsed = [_parse(spec) for spec in specs]
    short = [f"{kind}:{mode}" if mode else kind for kind, mode, _ in parsed]
    found, models = [], None
    for (kind, mode, model), name in zip(parsed, short, strict=True):
        if short.count(name) > 1 and model:
            name = f"{name}={Path(model).name}"
        if kind == "llama.cpp":
            found.append(_llama_cpp(setup, name, mode, Path(model).expanduser()))
            continue
        if models is None:
            from dspark.eval.runners.hf import StockModels

            info = setup.engine.target.info
            models = StockModels(dtype=info.dtype, device=info.device)
        found.append(_transformers(setup, name, mode, model, models))
    return found


def _parse(spec: str) -> tuple[str, str, str]:
    """Kind, mode ("" is plain) and model ("" is the target)."""
    match = _SPEC.fullmatch(spec)
    kind, mode, model = ("", "", "") if match is None else (part or "" for part in match.groups())
    needs_model = kind == "llama.cpp" or mode == "assisted"
    modes = {"transformers": ("", "lookup", "assisted"), "llama.cpp": ("", "lookup")}
    if mode not in modes.get(kind, ()) or needs_model != bool(model):
        raise ConfigError(f"--runner is {spec!r}, but must be {_SPECS}.")
    return kind, mode, model


def _transformers(setup: Setup, name: str, mode: str, model: str, models: Any) -> Contestant:
    from dspark.eval.runners.hf import PLAIN, HFRunner

    if model:
        resolve_model(model)  # now, where a progress bar can be shown, and before anything runs
    assistant = describe_model(model) if model else None
    return Contestant(
        name=name,
        kind="transformers",
        runner=HFRunner(
            models,
            setup.target,
            setup.params,
            eos=setup.engine.target.info.eos_token_ids,
            mode=mode or PLAIN,
            assistant=model or None,
        ),
        params=setup.params,
        facts={"mode": mode or PLAIN, "draft": assistant and assistant["id"]},
        identity={"assistant": assistant},
    )


def _llama_cpp(setup: Setup, name: str, mode: str, path: Path) -> Contestant:
    import torch

    from dspark.eval.runners.llama_cpp import LlamaCppRunner

    try:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    except OSError as exc:
        raise ConfigError(f"the GGUF file {path} cannot be read: {exc.strerror}.") from exc
    longest = max(len(request.token_ids) for request in setup.requests)
    info = setup.engine.target.info
    return Contestant(
        name=name,
        kind="llama.cpp",
        runner=LlamaCppRunner(
            path,
            setup.params,
            vocab_size=info.vocab_size,
            eos=info.eos_token_ids,
            context=longest + setup.params.max_tokens,
            threads=torch.get_num_threads(),
            has_lookup=mode == "lookup",
        ),
        params=setup.params,
        facts={"mode": mode or "plain"},
        identity={"file": path.name, "bytes": path.stat().st_size, "head": head},
    )


# -- servers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Servers to measure.

    Attributes:
        urls: [NAME=]URL each.
        model: The model to ask them for; None for the first that each lists.
        key_variable: Environment variable that holds their API key, or None.
        timeout: Seconds that a server may be silent.

    Raises:
        ConfigError: If the timeout is not above 0.
    """

    urls: Sequence[str]
    model: str | None = None
    key_variable: str | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"--url-timeout is {self.timeout:g}, but must be above 0 seconds.")


def server_contestants(setup: Setup, servers: Servers) -> list[Contestant]:
    """OpenAI-compatible servers.

    Raises:
        ConfigError: If a URL or the environment variable is of no use.
        DataError: If a server does not tell which model it has.
    """
    from dspark.eval.runners.endpoint import Endpoint
    from dspark.eval.runners.openai import OpenAIRunner, first_model

    if not servers.urls:
        return []
    api_key = None
    if servers.key_variable is not None:
        api_key = os.environ.get(servers.key_variable)
        if not api_key:
            raise ConfigError(
                f"--api-key-env names {servers.key_variable}, but that environment variable is "
                "not set."
            )
    found = []
    for spec in servers.urls:
        name, url = _split_url(spec)
        endpoint = Endpoint(url, api_key=api_key, timeout=servers.timeout)
        model = servers.model or first_model(endpoint)
        runner = OpenAIRunner(
            endpoint,
            setup.params,
            model=model,
            codec=setup.engine.codec,
            is_raw=setup.is_raw,
            think=setup.think,
        )
        found.append(
            Contestant(
                name=name or urlsplit(endpoint.url).netloc,
                kind="openai",
                runner=runner,
                params=setup.params,
                facts={"url": endpoint.url},
                identity={"url": endpoint.url, "model": model},
            )
        )
    return found


def _split_url(spec: str) -> tuple[str, str]:
    """Name ("" if there is none) and URL."""
    name, equals, url = spec.partition("=")
    is_named = bool(equals) and "/" not in name and ":" not in name
    return (name, url) if is_named else ("", spec)


# -- the whole --------------------------------------------------------------------------------


def pick_baseline(contestants: Sequence[Contestant], wanted: str | None) -> str:
    """The configuration that speed-ups are relative to.

    Args:
        contestants: All configurations.
        wanted: As --baseline; None for plain decoding.

    Raises:
        ConfigError: If there is no such configuration.
    """
    names = [contestant.name for contestant in contestants]
    name = NONE if wanted is None else wanted
    if name not in names:
        raise ConfigError(
            f"--baseline is {name!r}, but must be one of the configurations: {', '.join(names)}."
        )
    return name


def bench_key(header: Mapping[str, Any], contestants: Sequence[Contestant]) -> str:
    """Checksum of everything that decides what is measured, the repeats aside.

    The whole list of configurations is part of it: figures that are compared come from runs that
    were interleaved, never from two occasions.

    Args:
        header: Made by `build_header`, with `concurrencies`.
        contestants: All configurations.
    """
    names = ("code", "libraries", "processor", "device", "threads", "target", "prompts")
    more = ("template", "think", "effort", "seed", "warm_ups", "concurrencies")
    exact = {**header["exact"], "cost": None, "reason": None}  # these vary in time
    return settings_key(
        {
            **{name: header[name] for name in (*names, *more)},
            "exact": exact,
            "configurations": [
                [c.name, c.kind, dict(c.identity), c.runner.library, describe_params(c.params)]
                for c in contestants
            ],
        }
    )
