"""What a draft learns from: hidden states of the target, and what its output head makes of them.

Several sequences run through the target as one ragged batch, without logits: the laws are taken
later, row by row where blocks need them, from what the output head gets.

Letters: T tokens of a sequence, L captured layers, Dt hidden size of the target, n rows with a law,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.errors import CapabilityError
from dspark.target import BatchPart, SharesHeadRows, Target, TokenBatch
from dspark.training.samples import Sample

__all__ = ["Features", "TargetRunner", "head_totals"]

_TOTALS_BYTES = 24 << 20  # of one part's logits: the allocator hands back larger blocks every time


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the target says of one sample.

    Attributes:
        hidden: [T - 1, L * Dt], captured hidden states side by side, of every position but the
            last.
        final: [n, Dt], what the output head gets at positions start .. T - 2.
        total: float32 [n], logarithm of the sum of the exponentials of all logits there, at the
            run's temperature.
        best: int64 [n], the likeliest token there.
    """

    hidden: Tensor
    final: Tensor
    total: Tensor
    best: Tensor


class TargetRunner:
    """Runs samples through the target.

    Args:
        target: The target.
        layer_ids: Layers to capture.
        temperature: Of the laws.
        stored: Round to this dtype, so that features from a cache and fresh ones are the same;
            None leaves them as they are.

    Raises:
        CapabilityError: If the target does not give away rows of its head.
    """

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        *,
        temperature: float = 1.0,
        stored: torch.dtype | None = None,
    ) -> None:
        if not isinstance(target, SharesHeadRows):
            raise CapabilityError(
                f"{target.info.name} cannot be trained for: it does not share its output head."
            )
        self._target = target
        self._head = target
        self._layers = tuple(layer_ids)
        self._last = target.info.num_layers
        self._temperature = temperature
        self._stored = stored

    @torch.no_grad()
    def run(self, samples: Sequence[Sample]) -> list[Features]:
        """One forward over several samples.

        Args:
            samples: The samples.

        Returns:
            Their features, in order.
        """
        if not samples:
            return []
        captured = self._forward(samples)
        hidden = torch.cat([captured[layer] for layer in self._layers], dim=-1)
        final = captured[self._last]
        if self._stored is not None:
            hidden, final = hidden.to(self._stored), final.to(self._stored)
        made, row = [], 0
        wanted = []
        for sample in samples:
            rows = sample.length - 1
            # Clones, since what comes out of inference mode cannot be trained on.
            own = final[row + sample.start : row + rows].clone()
            made.append((hidden[row : row + rows].clone(), own))
            wanted.append(own)
            row += rows
        total, best = head_totals(self._head, torch.cat(wanted), self._temperature)
        sizes = [own.shape[0] for own in wanted]
        parts = zip(made, total.split(sizes), best.split(sizes), strict=True)
        return [Features(h, f, t.clone(), b.clone()) for (h, f), t, b in parts]

    def _forward(self, samples: Sequence[Sample]) -> dict[int, Tensor]:
        cache = self._target.new_cache()
        parts = []
        for sample in samples:
            rows = sample.length - 1
            slot, _ = cache.open([])
            cache.reserve(slot, rows)
            parts.append(BatchPart.chain(slot, sample.tokens[:-1], 0, want_last=False))
        capture = (*self._layers, self._last)
        return self._target.forward(TokenBatch.build(parts), cache, capture=capture).hidden


@torch.no_grad()
def head_totals(head: SharesHeadRows, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of all logits at a temperature, and the likeliest token, part by part.

    Args:
        head: The target.
        rows: [n, Dt], what its head gets.
        temperature: Of the law.

    Returns:
        (float32 [n], int64 [n]).
    """
    totals, best = [], []
    probe = head.unembed(rows[:1])
    size = max(1, _TOTALS_BYTES // (4 * probe.shape[-1]))
    for part in rows.split(size):
        logits = head.unembed(part).float()
        top, place = logits.max(dim=-1)
        sums = logits.sub_(top[:, None]).div_(temperature).exp_().sum(dim=-1)
        totals.append(sums.log_().add_(top / temperature))
        best.append(place)
    if not totals:
        return rows.new_zeros(0, dtype=torch.float32), rows.new_zeros(0, dtype=torch.int64)
    return torch.cat(totals), torch.cat(best)
