"""The two ways in: a model whose generate is ours, and a decoding method for one call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from dspark.engine_config import EngineConfig
from dspark.errors import CapabilityError, ConfigError
from dspark.hf.call import Call
from dspark.hf.decode import decode
from dspark.hf.refusal import Refusal, warn_once
from dspark.hf.session import Session, Settings
from dspark.request import RequestStats

__all__ = ["Accelerated", "accelerate", "generate", "hub_generate", "restore"]

_SESSIONS: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()
"""Sessions of models that were decoded by `generate`, not by `accelerate`."""

# Given arguments that send a call to transformers at once, without a word for the first one.
_ELSEWHERE = {
    "custom_generate": None,
    "assistant_model": "assisted generation: dspark has a draft of its own.",
    "synced_gpus": "synced_gpus: the model's other parts would wait.",
}


class Accelerated:
    """What stands in for a model's generate.

    Args:
        model: The model.
        settings: How it is accelerated.
        session: What is kept for the model already, if anything.
    """

    def __init__(self, model: Any, settings: Settings, session: Session | None = None) -> None:
        functools.update_wrapper(self, type(model).generate)
        self._model = model
        self._session = Session(settings) if session is None else session

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model gets a generate of its own, bound to the copy.
        return Accelerated, (self._model, self._session.settings)

    @property
    def session(self) -> Session:
        """What is kept for the model."""
        return self._session

    @property
    def stats(self) -> list[RequestStats]:
        """Statistics of the last accelerated call, one entry per row."""
        return list(self._session.stats)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's own generate would; see there for arguments and result."""
        bound = inspect.signature(type(self._model).generate).bind(self._model, *args, **kwargs)
        given = dict(bound.arguments)
        given.pop("self", None)
        given.update(given.pop("kwargs", {}))
        for name, reason in _ELSEWHERE.items():
            if given.get(name):
                if reason is not None:
                    warn_once(self._session.warned, reason)
                return self._stock(given)
        try:
            return self._stock(self._redirected(dict(given)))
        except (Refusal, CapabilityError) as exc:
            reason = exc.reason if isinstance(exc, Refusal) else exc.message
        warn_once(self._session.warned, reason)
        return self._stock(given)

    def _stock(self, arguments: dict[str, Any]) -> Any:
        return type(self._model).generate(self._model, **arguments)

    def _redirected(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments that make transformers prepare the call and hand it to us.

        It drops the streamer and the tokenizer of a call that is decoded by someone else, so both
        are taken out before.
        """
        streamer = arguments.pop("streamer", None)
        tokenizer = arguments.get("tokenizer")
        strings = self._stop_strings(arguments)
        if strings is not None and tokenizer is not None:
            criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
            criteria = list(arguments.get("stopping_criteria") or [])
            if not any(isinstance(own, StopStringCriteria) for own in criteria):
                criteria.append(criterion)
            arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
            arguments["stop_strings"] = None

        def run(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            call = Call(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                streamer,
            )
            return decode(self._session, call)

        return {**arguments, "custom_generate": run}

    def _stop_strings(self, arguments: dict[str, Any]) -> Any:
        """Stop strings in force: the call's, its config's or the model's."""
        if "stop_strings" in arguments:
            return arguments["stop_strings"]
        config = arguments.get("generation_config")
        own = None if config is None else config.stop_strings
        return self._model.generation_config.stop_strings if own is None else own


def accelerate(
    model: Any,
    draft: Any = "auto",
    *,
    tokenizer: Any = None,
    exact: bool = False,
    pack: bool | None = None,
    config: EngineConfig | None = None,
) -> Any:
    """Make a transformers model's generate speculative; `restore` undoes it.

    Only `model.generate` changes. Weights, layers, forward and state dict stay as they are; weights
    that are changed afterwards are noticed. Greedy text is what the model's own generate gives, but
    for near-ties that another order of summation decides; sampled text follows the same law, and
    its seed comes from torch's generator. A call that cannot be kept (beam search, processors that
    may keep state, ...) goes to the model's own generate with one `dspark.hf.FallbackWarning`.

    Args:
        model: A causal language model of a supported family.
        draft: "auto", "none", "lookup", "lookup:FILE", a model or draft module by name or folder,
            a loaded transformers model, or a drafter (docs/drafts.md).
        tokenizer: The model's; needed by "lookup:FILE", and compared with that of a named draft.
        exact: Exact mode: text that does not depend on batch and draft, to the bit
            (docs/losslessness.md). Packs weights, and checks them for some seconds.
        pack: Hold a second copy of the linear weights, packed so that verifying a tree costs little
            more than one token; None does so on a CPU with memory enough.
        config: Settings of the engine.

    Returns:
        The same model.

    Raises:
        ConfigError: If it is no transformers model that generates, its generate was replaced by
            somebody else, or the draft does not fit it.
        CheckpointError: If the draft cannot be found or read.

    Example:
        >>> model = dspark.accelerate(model, draft="lookup")  # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=40)  # doctest: +SKIP
        >>> dspark.restore(model)  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise ConfigError(
            f"model is of type {type(model).__name__}, but must be a transformers model that "
            "generates text."
        )
    own: Any = vars(model).get("generate")
    if own is not None and not isinstance(own, Accelerated):
        raise ConfigError(
            "the model's generate was replaced already, so it cannot be accelerated.",
            hint="load the model without trust_remote_code, or pass "
            "custom_generate=dspark.hf.generate",
        )
    settings = Settings(draft=draft, tokenizer=tokenizer, exact=exact, pack=pack, config=config)
    accelerated = Accelerated(model, settings)
    try:
        with accelerated.session.engine_of(model):
            pass
    except CapabilityError as exc:
        warn_once(accelerated.session.warned, exc.message)
    vars(model)["generate"] = accelerated
    return model


def restore(model: Any) -> Any:
    """Give a model its own generate back, and let go of what was kept for it.

    Args:
        model: What `accelerate` was given; any other model is left as it is.

    Returns:
        The same model.
    """
    if isinstance(vars(model).get("generate"), Accelerated):
        del vars(model)["generate"]
    _SESSIONS.pop(model, None)
    return model


def generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    dspark_draft: Any = "auto",
    dspark_streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode one call: `model.generate(..., custom_generate=dspark.hf.generate)`.

    The engine is made at the first call and kept for the model until `dspark.restore(model)` or
    another `dspark_draft`. transformers drops a `streamer` and refuses `stop_strings` where it does
    not decode itself: pass `dspark_streamer`, and a StopStringCriteria among `stopping_criteria`.

    Args:
        model: The model.
        input_ids: As transformers prepared them.
        logits_processor: The same.
        stopping_criteria: The same.
        generation_config: The same.
        dspark_draft: As `draft` of `accelerate`.
        dspark_streamer: Gets the prompt and every token.
        **model_kwargs: What else transformers prepared.

    Returns:
        What the model's generate returns.

    Raises:
        ConfigError: If the draft does not fit the model, or a streamer is given to a beam search.
        CapabilityError: If transformers itself no longer decodes in the way that was asked for.
    """
    call = Call(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        model_kwargs,
        dspark_streamer,
    )
    session = _session_of(model, Settings(draft=dspark_draft))
    try:
        return decode(session, call)
    except (Refusal, CapabilityError) as exc:
        reason = exc.reason if isinstance(exc, Refusal) else exc.message
    warn_once(session.warned, reason)
    return _stock_method(call)


def _stock_method(call: Call) -> Any:
    """Decode a prepared call by the method that transformers would have chosen."""
    mode = call.config.get_generation_mode()
    name = GENERATION_MODES_MAPPING[mode]
    if "/" in name:
        raise CapabilityError(
            f"transformers keeps {mode.value.replace('_', ' ')} in a repository of its own.",
            hint="leave out custom_generate=dspark.hf.generate",
        )
    method: Callable[..., Any] = getattr(type(call.model), name)
    known = inspect.signature(method).parameters
    arguments = dict(call.inputs)
    if "inputs_tensor" in known:
        arguments["inputs_tensor"] = call.input_ids
    if call.streamer is not None:
        if "streamer" not in known:
            raise ConfigError(f"a streamer cannot follow {mode.value.replace('_', ' ')}.")
        call.streamer.put(call.input_ids.cpu())
        arguments["streamer"] = call.streamer
    return method(
        call.model,
        call.input_ids,
        logits_processor=call.processors,
        stopping_criteria=call.criteria,
        generation_config=call.config,
        **arguments,
    )


def hub_generate(model: Any, *inputs: Any, **arguments: Any) -> Any:
    """Generate for a `custom_generate` folder, which is given all of generate's arguments.

    Args:
        model: The model.
        *inputs: Arguments of generate by place.
        **arguments: Those by name, and `dspark_draft`, `dspark_streamer`.

    Returns:
        What the model's generate returns.
    """
    streamer = arguments.pop("dspark_streamer", None)
    if streamer is not None:
        arguments["streamer"] = streamer
    session = _session_of(model, Settings(draft=arguments.pop("dspark_draft", "auto")))
    return Accelerated(model, session.settings, session)(*inputs, **arguments)


def _session_of(model: Any, settings: Settings) -> Session:
    """The session that is kept for a model, a new one if other settings are wanted."""
    session = _SESSIONS.get(model)
    if session is None or not session.settings.is_same(settings):
        session = _SESSIONS[model] = Session(settings)
    return session
