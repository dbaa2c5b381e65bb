"""One call of generate as transformers has prepared it, and whether dspark can run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from dspark.hf.refusal import Refusal

__all__ = ["Call", "check_call"]

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_INPUTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
_OWN_CRITERIA = (MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria, EosTokenCriteria)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What transformers hands to a decoding method.

    Attributes:
        model: The model.
        input_ids: int64 [B, T], left-padded, already repeated for several samples per prompt.
        processors: Logits processors, transformers' and the user's, in order.
        criteria: Stopping criteria, the same.
        config: The generation config with everything resolved.
        inputs: Further arguments of the model's forward.
        streamer: Gets the prompt and every token, or None.
    """

    model: Any
    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    inputs: dict[str, Any]
    streamer: Any = None

    @property
    def max_new_tokens(self) -> int:
        """Tokens per row at the most; one is always generated."""
        longest = self.criteria.max_length
        longest = self.config.max_length if longest is None else longest
        return max(1, int(longest) - int(self.input_ids.shape[1]))

    @property
    def end_tokens(self) -> frozenset[int] | None:
        """Tokens that end a row, or None where nothing is told of end tokens.

        Where it is None, transformers lets rows go on until the last of them is stopped.
        """
        ends = [c.eos_token_id for c in self.criteria if hasattr(c, "eos_token_id")]
        if not ends:
            return None
        return frozenset(
            int(token) for end in ends for token in torch.as_tensor(end).flatten().tolist()
        )


def check_call(call: Call) -> list[int]:
    """Find out whether dspark can run a call.

    Args:
        call: The call.

    Returns:
        Left padding of every row, in tokens.

    Raises:
        Refusal: If it cannot.
    """
    _check_config(call.config)
    for name, value in call.inputs.items():
        if name not in _INPUTS and value is not None:
            raise Refusal(f"{name}: only token ids and their mask are taken.")
    past = call.inputs.get("past_key_values")
    if past is not None and (getattr(past, "_is_user_defined", False) or past.get_seq_length()):
        raise Refusal("past_key_values: dspark keeps a cache of its own.")
    if call.config.return_dict_in_generate and call.config.output_scores:
        strange = [c for c in call.criteria if not isinstance(c, _OWN_CRITERIA)]
        if strange:
            name = type(strange[0]).__name__
            raise Refusal(f"output_scores beside {name}, which may look at the scores.")
    return _padding(call)


def _check_config(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise Refusal(f"{mode.value.replace('_', ' ')}: dspark decodes greedily or samples.")
    if config.is_assistant:
        raise Refusal("is_assistant: the model drafts for another one here.")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        kind = config.cache_implementation
        raise Refusal(f"cache_implementation={kind!r}: dspark keeps a cache of its own.")
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise Refusal(f"{name}: its shape follows the steps of plain decoding.")


def _padding(call: Call) -> list[int]:
    batch, length = call.input_ids.shape
    mask = call.inputs.get("attention_mask")
    positions = call.inputs.get("position_ids")
    if length == 0:
        raise Refusal("an empty prompt.")
    if mask is None:
        mask = torch.ones_like(call.input_ids)
    if tuple(mask.shape) != (batch, length):
        raise Refusal(f"an attention mask of shape {tuple(mask.shape)}.")
    shown = mask != 0
    if bool((shown[:, 1:] < shown[:, :-1]).any()) or not bool(shown[:, -1].all()):
        raise Refusal("an attention mask that hides more than padding on the left.")
    if positions is not None:
        counted = (shown.long().cumsum(-1) - 1).masked_fill(~shown, 0)
        given = positions.expand(batch, -1)
        if given.shape != counted.shape or bool(((given != counted) & shown).any()):
            raise Refusal("position ids that do not count the tokens from 0.")
    limit = call.model.config.get_text_config().max_position_embeddings
    padding = [int(count) for count in (~shown).sum(-1)]
    if length - min(padding) + call.max_new_tokens > limit:
        raise Refusal(
            f"a text that could pass the model's longest context of {limit} tokens (set "
            "max_new_tokens)."
        )
    return padding
