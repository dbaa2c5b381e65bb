"""What an engine takes in: prompts become token ids, requests that can never run are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

from dspark.active import ActiveRequest
from dspark.cache import Cache, PricesRequests
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.request import Prompt, Rule, SamplingParams
from dspark.target import Target
from dspark.text import TextCodec
from dspark.verify.constraint import PathMasks

__all__ = ["Intake"]

_EAGER_TOKENS = 512
"""Output tokens that memory is reserved for at admission where there is no limit to it."""

_HEADROOM_TOKENS = 64
"""The same where there is one. It doubles with every preemption of a request, so that one which
was sent back does not return for a moment only."""


class Intake:
    """Encodes and checks requests before they are queued.

    Args:
        target: The target.
        codec: Its text codec, or None.
        cache: The cache that requests will use.
        memory_limit: Bytes of that cache, or None.
        tree_budget: Nodes per round where a request does not say.
    """

    def __init__(
        self,
        target: Target,
        codec: TextCodec | None,
        cache: Cache,
        *,
        memory_limit: int | None,
        tree_budget: int,
    ) -> None:
        self._target = target
        self._codec = codec
        self._cache = cache
        self._memory_limit = memory_limit
        self._tree_budget = tree_budget

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids.

        Raises:
            DataError: If it is empty, of the wrong kind or outside the vocabulary.
            CapabilityError: If it needs a tokenizer or chat template that is not there.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise DataError("the prompt is empty.", hint="give at least one character")
            tokens = self._needs_codec().encode(prompt)
        else:
            tokens = self._encode_items(prompt)
        vocab = self._target.info.vocab_size
        bad = next((token for token in tokens if not 0 <= token < vocab), None)
        if bad is not None:
            raise DataError(f"token id {bad} is outside the vocabulary, 0 to {vocab - 1}.")
        return tokens

    def _encode_items(self, prompt: object) -> list[int]:
        """Encode a prompt that is a list of token ids or of chat messages."""
        try:
            items = list(prompt)  # type: ignore[call-overload]
        except TypeError as exc:
            raise DataError(
                f"a prompt is of type {type(prompt).__name__}, but must be a string, a list of "
                "token ids or a list of chat messages."
            ) from exc
        if not items:
            raise DataError("the prompt is empty.", hint="give at least one token")
        if all(isinstance(item, Mapping) for item in items):
            return self._needs_codec().encode_chat(items)
        bad = next((i for i in items if isinstance(i, bool) or not isinstance(i, Integral)), None)
        if bad is not None:
            raise DataError(
                f"a prompt holds {bad!r}, but its items must be all token ids or all chat messages."
            )
        return [int(item) for item in items]

    def _needs_codec(self) -> TextCodec:
        if self._codec is None:
            raise CapabilityError(
                f"{self._target.info.name} has no tokenizer, so prompts must be token ids.",
                hint="put its tokenizer.json into the folder, or pass token ids from Python",
            )
        return self._codec

    def bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the bad words, each with and without a leading space."""
        if not params.bad_words:
            return ()
        codec = self._needs_codec()
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word, " " + word):
                ids = tuple(codec.encode_plain(text))
                if ids:
                    found[ids] = None
        return tuple(found)

    def masks(self, params: SamplingParams) -> PathMasks | None:
        """What the grammar of one sample allows, None without one.

        Raises:
            CapabilityError: If the model has no token that ends a text.
            DsparkError: If the grammar cannot be followed.
        """
        if params.grammar is None:
            return None
        info = self._target.info
        if not info.eos_token_ids:
            raise CapabilityError(
                f"{info.name} names no end token, so a text could not end where its grammar ends."
            )
        return PathMasks(
            params.grammar,
            vocab_size=info.vocab_size,
            end_tokens=frozenset(info.eos_token_ids),
        )

    def check(self, tokens: Sequence[int], params: SamplingParams, rule: Rule) -> None:
        """Refuse a request that can never run.

        Raises:
            DataError: If the prompt is empty or too long.
            ConfigError: If parameters contradict each other or the target's mode.
            CapabilityError: If the cache could never hold it.
        """
        info = self._target.info
        if not tokens:
            raise DataError("the prompt is empty.", hint="give at least one token")
        if len(tokens) >= info.max_positions:
            raise DataError(
                f"the prompt has {len(tokens)} tokens, but {info.name} takes "
                f"{info.max_positions - 1} and needs room for an answer.",
                hint="shorten the prompt",
            )
        if params.stop:
            self._needs_codec()
        if rule is Rule.BLOCK and params.width not in (None, 1):
            raise ConfigError(
                f"rule is 'block' with width {params.width}, but block verification is for chains.",
                hint="use --width 1, or --rule rejection",
            )
        most = self._target.exactness.max_nodes
        if most is not None and params.tree_budget is not None and params.tree_budget > most:
            raise ConfigError(
                f"tree_budget is {params.tree_budget}, but exact mode verifies at most {most} "
                "nodes per request.",
                hint="lower the tree budget, or use --no-exact",
            )
        limit = self._memory_limit
        needed = 0 if limit is None else self._most_bytes(len(tokens), params)
        if limit is not None and needed > limit:
            raise CapabilityError(
                f"this request needs {needed / 2**20:.0f} MiB of K/V "
                f"cache, but the limit is {limit / 2**20:.0f} MiB.",
                hint="shorten the prompt, lower max_tokens or raise the memory limit",
            )

    def rows_to_begin(self, request: ActiveRequest) -> int:
        """Rows of cache that a request needs to be admitted: what it holds, and some to go on."""
        output = request.remaining(self._target.info.max_positions)
        if self._memory_limit is None:
            output = min(output, _EAGER_TOKENS)
        else:
            output = min(output, _HEADROOM_TOKENS << min(request.stats.preemptions, 16))
        return request.num_prefill + output + self._nodes(request.params) + 1

    def _most_bytes(self, prompt: int, params: SamplingParams) -> int:
        """Bytes of cache that a request may come to hold."""
        tokens = min(prompt + params.max_tokens, self._target.info.max_positions)
        rows = tokens + self._nodes(params) + 1
        if isinstance(self._cache, PricesRequests):
            return self._cache.request_bytes(rows)
        pages = -(-rows // self._cache.usage().page_tokens)
        return pages * self._cache.page_bytes()

    def _nodes(self, params: SamplingParams) -> int:
        return self._tree_budget if params.tree_budget is None else params.tree_budget
