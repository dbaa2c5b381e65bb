"""What runs the forwards of a module that predicts blocks: context, block and branches.

`PlainRunner` does it with the module's own layers, on any device. A loader may give a module a
faster one (`dspark.adapters.fused`); it computes the same.

Letters: B requests, S slots of a block, G depths wanted, n rows, D hidden size, V vocabulary,
Vd draft vocabulary, R nodes, K rank of the sequential head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.draft.block_module import BlockModule
from dspark.draft.calibration import SurvivalMap
from dspark.draft.draft_cache import ContextCache
from dspark.draft.dspark_config import Window
from dspark.tree_build import TreeGrower

__all__ = ["Ask", "BlockRunner", "Found", "NewRows", "PlainRunner", "Wanted"]

NewRows: TypeAlias = tuple[ContextCache, Sequence[int], Tensor]
"""A cache, the tokens of all positions before the anchor, hidden states of the last of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Which candidates of one node to find.

    Attributes:
        depth: int, row of the request's base logits, 0 for the anchor's children.
        request: int, which of the blocks.
        count: Candidates to find, the best ones.
        temperature: What logits are divided by.
        noise: float32 [V], added behind that by token; None for none.
    """

    depth: int
    request: int
    count: int
    temperature: float
    noise: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Candidates of R nodes, best first.

    Attributes:
        tokens: int64 [R, m], token ids; -1 where there are no more.
        values: float32 [R, m], shaped logits with noise, less a number of the row's.
        log_sum: float32 [R], log of the row's sum of e^value, 0 where there was noise; not finite
            where a logit is not.
    """

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]
    log_sum: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> Found:
        """Those of some of the nodes."""
        part = slice(start, stop)
        return Found(self.tokens[part], self.values[part], self.log_sum[part])


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A tree to grow behind one block, as `dspark.draft.grow.RankedGrowth` grows it.

    Attributes:
        request: int, which of the blocks.
        anchor: int, the token that the tree follows.
        budget: Nodes that will be kept.
        depth: Longest path.
        width: Children per node.
        count: Candidates to look at for each node.
        beams: Nodes to expand per level.
        min_survival: Nodes less likely than this are not expanded.
        temperature: What logits are divided by.
        noise: float32 [V] for each depth, added behind that by token; None for none.
        rating: How children are rated; None by the draft's own shares.
    """

    request: int
    anchor: int
    budget: int
    depth: int
    width: int
    count: int
    beams: int
    min_survival: float
    temperature: float
    noise: Sequence[NDArray[np.float32]] | None
    rating: SurvivalMap | None


class BlockRunner(Protocol):
    """Forwards of a module, for several requests at once."""

    def new_cache(self) -> ContextCache:
        """A cache for a request's context."""
        ...

    def take(self, parts: Sequence[NewRows]) -> None:
        """Put keys and values of new positions into caches.

        Args:
            parts: What arrived, per request.
        """
        ...

    def run(
        self, anchors: Sequence[int], caches: Sequence[ContextCache], depth: int
    ) -> tuple[Tensor, Tensor]:
        """Run one block per request behind its context.

        Args:
            anchors: Last token of each.
            caches: Their contexts.
            depth: G >= 1, depths wanted.

        Returns:
            Hidden states [B, S, D] and base logits, float32 [B, G, Vd].
        """
        ...

    def find(self, wanted: Sequence[Wanted], latent: Tensor | None) -> Found | None:
        """Candidates of nodes of the last block.

        Args:
            wanted: One per node.
            latent: [R, K], what the sequential head's second matrix is applied to; None without
                such a head.

        Returns:
            The candidates; None if this runner leaves that to torch.
        """
        ...

    def grow(self, asks: Sequence[Ask]) -> list[TreeGrower] | None:
        """Whole trees behind the last block.

        Args:
            asks: One per tree.

        Returns:
            The trees before they are cut to their budgets; None if this runner does not grow such
            trees, or a logit is no number.
        """
        ...


class PlainRunner:
    """Runs a module's own layers.

    Args:
        module: The module.
    """

    def __init__(self, module: BlockModule) -> None:
        self._module = module
        self._windows = [Window(size=w) if isinstance(w, int) else w for w in module.windows]

    def new_cache(self) -> ContextCache:
        """See `BlockRunner.new_cache`."""
        return ContextCache([None if window is None else window.size for window in self._windows])

    def take(self, parts: Sequence[NewRows]) -> None:
        """See `BlockRunner.take`; one product for all of them."""
        module = self._module
        positions = [
            torch.arange(len(tokens) - rows.shape[0], len(tokens), device=module.device)
            for _, tokens, rows in parts
        ]
        c = module.combine(torch.cat([rows for _, _, rows in parts]))
        layers = module.context(c, torch.cat(positions))
        start = 0
        for cache, tokens, rows in parts:
            count = int(rows.shape[0])
            part = slice(start, start + count)
            kept = [(key[part], value[part]) for key, value in layers]
            cache.append(tokens[len(tokens) - count :], kept)
            start += count

    def run(
        self, anchors: Sequence[int], caches: Sequence[ContextCache], depth: int
    ) -> tuple[Tensor, Tensor]:
        """See `BlockRunner.run`."""
        module, config, device = self._module, self._module.config, self._module.device
        slots = config.block_size
        tokens = torch.full((len(caches), slots), config.mask_token_id, device=device)
        tokens[:, 0] = torch.tensor(anchors, device=device)
        starts = torch.tensor([cache.length for cache in caches], device=device)
        positions = starts[:, None] + torch.arange(slots, device=device)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            out = torch.empty_like(queries)
            for row, cache in enumerate(caches):
                part = slice(row * slots, (row + 1) * slots)
                out[part] = self._attend(cache, layer, queries[part], keys[part], values[part])
            return out

        hidden = module.block(module.embed(tokens.flatten()), positions.flatten(), attend)
        hidden = hidden.view(len(caches), slots, -1)
        predicting = hidden[:, config.first_slot : config.first_slot + depth]
        base = module.base_logits(predicting.flatten(0, 1))
        return hidden, base.view(len(caches), depth, -1)

    def find(self, wanted: Sequence[Wanted], latent: Tensor | None) -> Found | None:
        """None: torch does it."""
        del wanted, latent
        return None

    def grow(self, asks: Sequence[Ask]) -> list[TreeGrower] | None:
        """None: the drafter does it level by level."""
        del asks
        return None

    def _attend(
        self, cache: ContextCache, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        window = self._windows[layer]
        reach = None if window is None else window.size - window.moves
        key, value, context = cache.with_block(layer, keys, values, reach)
        mask = None
        if window is not None and (window.moves or window.is_causal):
            slots = queries.shape[0]
            slot = torch.arange(slots, device=queries.device)[:, None]
            column = torch.arange(-context, slots, device=queries.device)[None]
            mask = torch.ones(slots, context + slots, dtype=torch.bool, device=queries.device)
            if window.moves:
                mask &= (column > slot - window.size) | (column >= 0)
            if window.is_causal:
                mask &= column <= slot
        return self._module.attend(layer, queries, key, value, mask)
