"""The loss of a DSpark draft, one position at a time in float64, from its definition.

DSpark, arXiv 2607.05147, equations 9 to 12; the cross-entropy with the target's law as EAGLE-3 is
trained. Nothing here is shared with dspark.training; plain
loops over positions and tokens.

Positions: an anchor at s; depth k = 1, 2, ... predicts token s + k, which exists up to the last
token. The target's law there is its law at position s + k - 1.
"""

from __future__ import annotations

import math


def law_of(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    powers = [math.exp((value - top) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def distance(draft: list[float], target: list[float], ids: list[int]) -> float:
    """L1 between a law over `ids` and a law over everything."""
    place = {token: row for row, token in enumerate(ids)}
    return math.fsum(
        abs((draft[place[token]] if token in place else 0.0) - mass)
        for token, mass in enumerate(target)
    )


def cross_entropy(logit: float, chance: float) -> float:
    """-(c log sigmoid(z) + (1 - c) log(1 - sigmoid(z)))."""
    return chance * math.log1p(math.exp(-logit)) + (1 - chance) * math.log1p(math.exp(logit))


class Oracle:
    """Losses and figures of blocks.

    Args:
        ids: The draft's vocabulary.
        terms: Weights of CE, L1, BCE.
        decay: Of the position weights.
        temperature: Of both laws.
        labels: What the cross-entropy is taken with, the text or the target's law.
    """

    def __init__(self, ids, terms=(0.1, 0.9, 1.0), decay=4.0, temperature=1.0, labels="text"):
        self.ids, self.terms, self.decay, self.temperature = list(ids), terms, decay, temperature
        self.labels = labels

    def cross_entropy(self, draft, target, label):
        """With the text's token, or with the target's law over the draft's vocabulary."""
        if self.labels == "text":
            return -math.log(draft[self.ids.index(label)]) if label in self.ids else 0.0
        if max(range(len(target)), key=target.__getitem__) not in self.ids:
            return 0.0
        inside = [target[token] for token in self.ids]
        shares = [mass / math.fsum(inside) for mass in inside]
        return -math.fsum(p * math.log(q) for p, q in zip(shares, draft, strict=True))

    def position(self, draft_logits, target_logits, label, confidence):
        """(CE, L1, BCE, acceptance, agreement) of one position."""
        draft = law_of(draft_logits, self.temperature)
        target = law_of(target_logits, self.temperature)
        ce = self.cross_entropy(draft, target, label)
        l1 = distance(draft, target, self.ids)
        acceptance = 1 - l1 / 2
        bce = 0.0 if confidence is None else cross_entropy(confidence, acceptance)
        guess = self.ids[max(range(len(draft)), key=draft.__getitem__)]
        truth = max(range(len(target)), key=target.__getitem__)
        return ce, l1, bce, acceptance, guess == truth

    def evaluate(self, blocks):
        """Loss and figures of blocks.

        Args:
            blocks: Per block, per valid depth: (draft logits over the vocabulary `ids`, target
                logits over everything, label, confidence logit or None); and G, the depths of a
                whole block: [(positions, G), ...].
        """
        loss = total = 0.0
        gamma = blocks[0][1]
        counts, accepted, agreed = [0] * gamma, [0.0] * gamma, [0] * gamma
        reached, went_on = [0] * gamma, [0] * gamma
        greedy, sampling = [], []
        for positions, _ in blocks:
            chain, product, lengths = True, 1.0, [0.0, 0.0]
            for k, position in enumerate(positions, start=1):
                ce, l1, bce, acceptance, agrees = self.position(*position)
                weight = math.exp(-(k - 1) / self.decay)
                total += weight
                parts = zip(self.terms, (ce, l1, bce), strict=True)
                loss += weight * math.fsum(a * b for a, b in parts)
                counts[k - 1] += 1
                accepted[k - 1] += acceptance
                agreed[k - 1] += agrees
                reached[k - 1] += chain
                chain = chain and agrees
                went_on[k - 1] += chain
                product *= acceptance
                lengths[0] += chain
                lengths[1] += product
            if len(positions) == gamma:
                greedy.append(lengths[0])
                sampling.append(lengths[1])
        return {
            "loss": loss / total,
            "acceptance": [a / c if c else 0.0 for a, c in zip(accepted, counts, strict=True)],
            "agreement": [a / c if c else 0.0 for a, c in zip(agreed, counts, strict=True)],
            "conditional": [a / c if c else 0.0 for a, c in zip(went_on, reached, strict=True)],
            "tau_greedy": 1 + (math.fsum(greedy) / len(greedy) if greedy else 0.0),
            "tau_sampling": 1 + (math.fsum(sampling) / len(sampling) if sampling else 0.0),
        }
