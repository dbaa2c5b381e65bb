"""The output has the target's law: exactly, by integrating over every uniform.

The integrator treats a rule as a black box. For every tree that a drafter can draw it finds, by
bisection, where the rule's decisions change with each uniform, and adds up the joint law of the
first tokens that come out. Planted faults show that it has teeth.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dspark.tree import POINT_MASS, DraftTree, Proposal
from dspark.verify.rules import Walk, children_of, walk_block, walk_rejection

VOCAB = 3
HORIZON = 3
NEARLY_ONE = 1 - 2.0**-53

Level = list[tuple[str, int]]  # (source, candidates): "a", "b" draw from a law, "x", "y" do not

SHAPES: dict[str, list[Level]] = {
    "empty": [],
    "one node": [[("a", 1)]],
    "chain": [[("a", 1)], [("a", 1)]],
    "long chain": [[("b", 1)], [("b", 1)], [("a", 1)]],
    "pair": [[("a", 2)]],
    "wide": [[("a", 3)]],
    "binary": [[("a", 2)], [("a", 2)]],
    "lookup": [[("x", 1)], [("x", 1)]],
    "duplicates": [[("x", 1), ("a", 1), ("x", 1), ("b", 1), ("b", 1)]],
    "merged": [[("a", 1), ("b", 1)], [("a", 1)]],
    "interleaved": [[("a", 1), ("b", 2), ("x", 1), ("y", 1), ("a", 2)]],
}


def random_law(*words: int, peak: float = 1.5) -> np.ndarray:
    x = np.exp(peak * np.random.default_rng([w + 1 for w in words]).normal(size=VOCAB))
    return x / x.sum()


@functools.cache
def target_of(context: tuple[int, ...]) -> np.ndarray:
    law = random_law(1, *context)
    if len(context) == 1:  # a token that can never come out
        law[context[0]] = 0
    law /= law.sum()
    law.setflags(write=False)  # a rule must leave it as it is
    return law


@functools.cache
def draft_of(source: str, context: tuple[int, ...]) -> np.ndarray:
    if source in "xy":
        law = np.zeros(VOCAB)
        law[(len(context) + "xy".index(source)) % VOCAB] = 1
        return law
    return random_law(2 + "ab".index(source), *context)


@dataclass
class Growing:
    """A tree under construction; `contexts` are the tokens to each node."""

    weight: float = 1.0
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    contexts: list[tuple[int, ...]] = field(default_factory=list)
    laws: list[np.ndarray] = field(default_factory=list)
    law_of: list[int] = field(default_factory=list)

    def proposal(self) -> Proposal:
        depth = np.array([len(c) for c in self.contexts], dtype=np.int64)
        tree = DraftTree(
            token=np.array(self.tokens, dtype=np.int64),
            parent=np.array(self.parents, dtype=np.int64),
            depth=depth,
            survival=np.ones(len(depth)),
        )
        rows = torch.from_numpy(np.stack(self.laws)) if self.laws else None
        return Proposal(tree=tree, laws=rows, law_of=np.array(self.law_of, dtype=np.int64))


def draws(law: np.ndarray, count: int, fault: str | None) -> Iterator[tuple[float, list[int]]]:
    """Every ordered draw without replacement and its probability."""
    if fault == "argmax draft, softmax law":
        yield 1.0, np.argsort(-law)[:count].tolist()
        return
    for order in itertools.permutations(range(VOCAB), count):
        weight, left = 1.0, 1.0
        for token in order:
            weight *= law[token] / left
            left -= law[token]
        if fault == "children sorted by draft probability":
            order = tuple(sorted(order, key=lambda t: -law[t]))
        yield weight, list(order)


def children(tree: Growing, node: int, level: Level, fault: str | None) -> Iterator[Growing]:
    """Every way to add one level of children under a node."""
    context = tree.contexts[node] if node >= 0 else ()
    first = len(tree.laws)
    sampled = [(s, n) for s, n in level if s in "ab"]
    rows = {s: first + i for i, (s, _) in enumerate(sampled)}
    options = [list(draws(draft_of(s, context), n, fault)) for s, n in sampled]
    for picks in itertools.product(*options):
        grown = Growing(tree.weight, *(list(x) for x in (tree.tokens, tree.parents)))
        grown.contexts, grown.laws = list(tree.contexts), list(tree.laws)
        grown.law_of = list(tree.law_of)
        grown.laws += [draft_of(s, context) for s, _ in sampled]
        order = iter(picks)
        for source, _ in level:
            if source in "xy":
                tokens, row = [int(draft_of(source, context).argmax())], POINT_MASS
            else:
                weight, tokens = next(order)
                grown.weight *= weight
                row = rows[source]
            for token in tokens:
                grown.tokens.append(token)
                grown.parents.append(node)
                grown.contexts.append((*context, token))
                grown.law_of.append(row)
        yield grown


def every_tree(levels: list[Level], fault: str | None = None) -> list[Growing]:
    """Every tree that the toy drafter can draw, with its probability."""
    trees, frontier_start = [Growing()], 0
    for depth, level in enumerate(levels):
        sizes = len(trees[0].tokens)
        frontier = [-1] if depth == 0 else list(range(frontier_start, sizes))
        for node in frontier:
            trees = [g for t in trees for g in children(t, node, level, fault)]
        frontier_start = sizes
    return [t for t in trees if t.weight > 0]


LawRule = Callable[..., Walk]


def outcomes(rule: LawRule, tree: Growing) -> Iterator[tuple[float, Walk]]:
    """Integrate a rule over its uniforms: every outcome with its probability."""
    proposal = tree.proposal()

    def law(row: int) -> np.ndarray:
        return target_of(tree.contexts[row - 1] if row else ())

    def run(script: list[float]) -> tuple[Walk, int]:
        asked = 0

        def uniform(_: int) -> float:
            nonlocal asked
            asked += 1
            return script[asked - 1] if asked <= len(script) else NEARLY_ONE

        return rule(proposal, law, uniform), asked

    def branch(script: list[float], weight: float) -> Iterator[tuple[float, Walk]]:
        walk, asked = run(script)
        if asked <= len(script):
            yield weight, walk
            return
        low, high = 0.0, NEARLY_ONE
        at_low, at_high = run([*script, low])[0].path, run([*script, high])[0].path
        if at_low == at_high:
            yield from branch([*script, 0.5], weight)
            return
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (
                (middle, high) if run([*script, middle])[0].path == at_low else (low, middle)
            )
        yield from branch([*script, low / 2], weight * low)
        yield from branch([*script, (1 + high) / 2], weight * (1 - low))

    yield from branch([], 1.0)


def joint(prefix: tuple[int, ...]) -> np.ndarray:
    """The target's law of the first tokens, given how they begin."""
    out = np.zeros((VOCAB,) * HORIZON)
    for tokens in itertools.product(range(VOCAB), repeat=HORIZON):
        if tokens[: len(prefix)] != prefix[:HORIZON]:
            continue
        steps = range(len(prefix), HORIZON)
        out[tokens] = np.prod([target_of(tokens[:t])[tokens[t]] for t in steps])
    return out


JOINT = {p: joint(p) for n in range(4) for p in itertools.product(range(VOCAB), repeat=n)}


def emitted(rule: LawRule, trees: list[Growing]) -> tuple[np.ndarray, float]:
    """The joint law of what comes out, and the expected accept_len."""
    out, accepted = np.zeros((VOCAB,) * HORIZON), 0.0
    for tree in trees:
        for weight, walk in outcomes(rule, tree):
            path = tree.contexts[walk.path[-1]] if walk.path else ()
            accepted += tree.weight * weight * len(path)
            for token, mass in enumerate(walk.law / walk.law.sum()):
                out += tree.weight * weight * mass * JOINT[(*path, token)[:HORIZON]]
    return out, accepted


def error_of(rule: LawRule, shape: str, fault: str | None = None) -> float:
    out, _ = emitted(rule, every_tree(SHAPES[shape], fault))
    return float(np.abs(out - JOINT[()]).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_rejection_has_the_targets_law_exactly(shape: str) -> None:
    assert error_of(walk_rejection, shape) < 1e-8


@pytest.mark.parametrize("shape", ["empty", "one node", "chain", "long chain", "lookup"])
def test_block_verification_has_the_targets_law_exactly(shape: str) -> None:
    assert error_of(walk_block, shape) < 1e-8


def test_block_verification_accepts_at_least_as_much_as_rejection() -> None:
    trees = every_tree(SHAPES["chain"])
    by_block, by_token = emitted(walk_block, trees)[1], emitted(walk_rejection, trees)[1]
    assert by_block > by_token + 1e-3


def plain_rejection(fault: str | None) -> LawRule:  # noqa: C901 - one branch per fault
    """An independent rejection rule, with one fault or none."""

    def judge_law(proposal: Proposal, node: int, size: int) -> np.ndarray:
        k = proposal.law_of[node]
        if k < 0:
            return np.eye(size)[proposal.tree.token[node]]
        return proposal.laws[k].numpy().copy()

    def rule(  # noqa: C901 - one branch per fault
        proposal: Proposal, target_law: Callable, uniform: Callable
    ) -> Walk:
        path, row, last = [], 0, None
        while True:
            p = target_law(0 if fault == "law of row 0" else row).copy()
            first = p.copy()
            used: dict[int, list[int]] = {}
            kids = children_of(proposal.tree)[row]
            for node in kids:
                token, group = proposal.tree.token[node], int(proposal.law_of[node])
                q = judge_law(proposal, node, len(p))
                if fault == "draft law of node 0":
                    q = judge_law(proposal, 0, len(p))
                if group >= 0 and fault != "draft law keeps rejected tokens":
                    q[used.get(group, [])] = 0
                    q /= q.sum() or 1
                if q[token] == 0:
                    continue
                last = q
                slack = {"5 % lenient": 1.05, "1 % lenient": 1.01}.get(fault or "", 1)
                if uniform(node) < slack * p[token] / q[token]:
                    path.append(node)
                    row = node + 1
                    break
                p = np.maximum(p - q, 0)
                p = p / p.sum() if p.sum() > 0 else first
                if fault == "residual not handed to siblings" and node != kids[-1]:
                    p = first
                used.setdefault(group, []).append(token)
            else:
                break
        if fault == "no residual":
            p = first
        if last is not None and not kids and fault == "closing law from the draft":
            p = last
        if last is not None and not kids and fault == "full acceptance taken for rejection":
            p = np.maximum(p - last, 0)
        return Walk(tuple(path), (), p)

    return rule


def faulty_block(fault: str) -> LawRule:
    """Block verification with one fault."""

    def rule(proposal: Proposal, target_law: Callable, uniform: Callable) -> Walk:
        n, ratio, best = len(proposal.tree.token), 1.0, 0
        p, q = target_law(0), proposal.laws[0].numpy()
        closing = np.maximum(p - q, 0)
        for node in range(n):
            token = proposal.tree.token[node]
            ratio = ratio * p[token] / q[token]
            ratio = ratio if fault == "ratio not capped" else min(ratio, 1.0)
            p, u = target_law(node + 1), uniform(node)
            if node == n - 1:
                rest, test = p, ratio
            else:
                q = proposal.laws[proposal.law_of[node + 1]].numpy()
                scale = 1.0 if fault == "residual without the ratio" else ratio
                rest = np.maximum(scale * p - q, 0)
                mass = np.maximum(ratio * p - q, 0).sum()
                test = mass / max(mass + 1 - ratio, 1e-300)
            if u < test and rest.sum() > 0:
                best, closing = node + 1, rest
            elif fault == "stops at the first failure":
                break
        return Walk(tuple(range(best)), (), closing)

    return rule


def test_the_independent_rule_without_a_fault_agrees() -> None:
    for shape in ("chain", "interleaved"):
        assert error_of(plain_rejection(None), shape) < 1e-8
    assert error_of(faulty_block("none"), "long chain") < 1e-8


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("no residual", "one node"),
        ("law of row 0", "chain"),
        ("draft law of node 0", "chain"),
        ("draft law keeps rejected tokens", "wide"),
        ("residual not handed to siblings", "pair"),
        ("5 % lenient", "one node"),
        ("1 % lenient", "one node"),
        ("closing law from the draft", "chain"),
        ("full acceptance taken for rejection", "chain"),
    ],
)
def test_teeth_a_faulty_rejection_rule_is_caught(fault: str, shape: str) -> None:
    assert error_of(plain_rejection(fault), shape) > 1e-4


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("argmax draft, softmax law", "one node"),
        ("argmax draft, softmax law", "pair"),
        ("children sorted by draft probability", "pair"),
    ],
)
def test_teeth_a_drafter_that_misstates_its_draws_is_caught(fault: str, shape: str) -> None:
    assert error_of(walk_rejection, shape, fault) > 1e-4


@pytest.mark.parametrize(
    "fault", ["ratio not capped", "residual without the ratio", "stops at the first failure"]
)
def test_teeth_a_faulty_block_rule_is_caught(fault: str) -> None:
    assert error_of(faulty_block(fault), "long chain") > 1e-4
