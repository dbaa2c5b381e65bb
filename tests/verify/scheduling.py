"""Random offers, a plain reference for what a schedule is worth, and what rules have to know."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from dspark.tree import DraftTree
from dspark.verify.scheduler import Cut, Load, Offer, Scheduler
from dspark.verify.scheduler_setting import Schedule

Admitted = list[np.ndarray]  # bool per offer


def load_of(seconds: Sequence[float], value: float = 1.0) -> Load:
    """A round whose forward takes seconds[n] with n nodes; the last one goes on."""

    def rates(nodes: int) -> np.ndarray:
        more = [seconds[-1]] * max(0, nodes + 1 - len(seconds))
        return 1 / np.array([*seconds, *more])[: nodes + 1]

    return Load(value, rates)


def plan(schedule: str, offers: Sequence[Offer], load: Load) -> Admitted:
    """What a fresh scheduler admits."""
    return masks(offers, Scheduler(Schedule.parse(schedule)).plan(offers, load))


def masks(offers: Sequence[Offer], cuts: Sequence[Cut]) -> Admitted:
    """Cuts as masks."""
    return [
        np.ones(offer.tree.num_nodes, dtype=bool) if cut.keep is None else cut.keep
        for offer, cut in zip(offers, cuts, strict=True)
    ]


def theta(offers: Sequence[Offer], admitted: Admitted, load: Load) -> float:
    """What a choice is worth, written down as the definition says."""
    rows = sum(int(keep.sum()) for keep in admitted)
    value = load.value
    for offer, keep in zip(offers, admitted, strict=True):
        value += offer.weight * sum(offer.tree.survival[keep])
    return value * load.rates(rows)[rows]


def is_closed(tree: DraftTree, keep: np.ndarray) -> bool:
    """Whether no node is kept without its parent."""
    return all(p < 0 or keep[p] for p, k in zip(tree.parent, keep, strict=True) if k)


def closed_sets(tree: DraftTree) -> list[np.ndarray]:
    """All sets of nodes that are closed under ancestors."""
    sets = itertools.product([False, True], repeat=tree.num_nodes)
    return [k for k in (np.array(s, dtype=bool) for s in sets) if is_closed(tree, k)]


def best_theta(offers: Sequence[Offer], load: Load) -> float:
    """The most that any choice is worth, by trying all of them."""
    options = [
        [(int(k.sum()), o.weight * sum(o.tree.survival[k])) for k in closed_sets(o.tree)]
        for o in offers
    ]
    rates = load.rates(sum(offer.tree.num_nodes for offer in offers))
    return max(
        (load.value + sum(gain for _, gain in choice)) * rates[sum(rows for rows, _ in choice)]
        for choice in itertools.product(*options)
    )


def tree_of(parents: Sequence[int], steps: Sequence[float]) -> DraftTree:
    """A tree whose survival is the product of `steps` along the path."""
    survival: list[float] = []
    for parent, step in zip(parents, steps, strict=True):
        survival.append(step * (survival[parent] if parent >= 0 else 1.0))
    return DraftTree.build([1] * len(parents), parents, survival)


def chain_of(*survival: float) -> DraftTree:
    return DraftTree.build([1] * len(survival), range(-1, len(survival) - 1), survival)


_steps = st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 1.0])  # few values, so that ties occur


@st.composite
def trees(draw: st.DrawFn, most: int = 5) -> DraftTree:
    """A small tree, a chain half of the time."""
    size = draw(st.integers(0, most))
    if draw(st.booleans()):
        parents = list(range(-1, size - 1))
    else:
        parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
    return tree_of(parents, [draw(_steps) for _ in range(size)])


@st.composite
def rounds(draw: st.DrawFn, *, drawn: bool | None = False) -> tuple[list[Offer], float]:
    """Offers of a round and the value of its anchors; drawn=None mixes rules."""
    offers = []
    for number in range(draw(st.integers(1, 3))):
        offers.append(
            Offer(
                request_id=number,
                tree=draw(trees(4)),
                weight=draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
                is_drawn=draw(st.booleans()) if drawn is None else drawn,
                noise=draw(st.sampled_from([number, number, "shared"])),
            )
        )
    return offers, sum(offer.weight for offer in offers)


jagged = st.lists(st.floats(0.2, 3.0), min_size=13, max_size=13)
lines = st.tuples(st.floats(0.1, 3.0), st.floats(0.0, 1.0)).map(
    lambda line: [line[0] + line[1] * n for n in range(13)]
)
