"""Faults that an audit must find, each planted into the real code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark import engine as engine_module
from dspark.adapters.hf.store import StoreCache
from dspark.draft import grow
from dspark.verify import rules, verifier
from dspark.verify.noise import NoiseKey

Plant = Callable[[pytest.MonkeyPatch], None]


def no_residual(patch: pytest.MonkeyPatch) -> None:
    """After a rejection the target's own law is drawn from, whatever the draft's was."""
    patch.setattr(rules, "_residual", lambda target, _: target)
    patch.setattr(rules, "_block_residual", lambda _, target, __: target)


def warm_draws(patch: pytest.MonkeyPatch) -> None:
    """The drafter draws at temperature 1 and records the law at the request's temperature."""
    draw = grow.noise.draft_topk

    def topk(shaped, *args):
        return draw(0.7 * shaped, *args)

    patch.setattr(grow.noise, "draft_topk", topk)


def cold_target(patch: pytest.MonkeyPatch) -> None:
    """Drafted rounds are verified at temperature 1, plain steps at the request's."""
    shape = verifier._shape

    def shaped(logits, jobs):
        return shape(
            logits,
            [
                replace(job, params=replace(job.params, temperature=1.0))
                if len(job.proposal.tree.token) and job.params.temperature
                else job
                for job in jobs
            ],
        )

    patch.setattr(verifier, "_shape", shaped)


def bf16_draws(patch: pytest.MonkeyPatch) -> None:
    """The drafter draws from bfloat16 logits and records the float32 law."""
    draw = grow.noise.draft_topk

    def topk(shaped, *args):
        return draw(shaped.to(torch.bfloat16).float(), *args)

    patch.setattr(grow.noise, "draft_topk", topk)


def noise_reused(patch: pytest.MonkeyPatch) -> None:
    """All samples of a request have the noise of the first one."""
    patch.setattr(engine_module, "NoiseKey", lambda seed, sample: NoiseKey(seed, 0 * sample))


def rejected_rows_kept(patch: pytest.MonkeyPatch) -> None:
    """Accepted rows are not moved to where the rejected ones before them stand."""
    patch.setattr(StoreCache, "_move", lambda *_: None)


def everything_committed(patch: pytest.MonkeyPatch) -> None:
    """Rows of a chain are all kept, accepted or not."""
    commit = StoreCache.commit

    def keep(self, slot, path):
        _, parents = self.state(slot).pending
        is_chain = list(parents) == list(range(-1, len(parents) - 1))
        commit(self, slot, range(len(parents)) if is_chain and len(path) else path)
        if not is_chain:
            self.state(slot).tokens.append(0)

    patch.setattr(StoreCache, "commit", keep)


def closing_from_the_draft(patch: pytest.MonkeyPatch) -> None:
    """The closing token is the draft's next one, or drawn from its last law."""
    walk_targets, walk_rejection = verifier.walk_targets, verifier.walk_rejection
    walk_block = verifier.walk_block

    def by_token(tree, targets):
        path, tried, closing = walk_targets(tree, targets)
        children = rules.children_of(tree)[path[-1] + 1 if path else 0]
        return path, tried, int(tree.token[children[0]]) if children else closing

    def by_law(walk):
        def closed(proposal, target_law, uniform):
            done = walk(proposal, target_law, uniform)
            if len(done.path) and len(done.path) == proposal.tree.max_depth:
                law = proposal.laws[proposal.law_of[done.path[-1]]].double().numpy()
                return rules.Walk(done.path, done.tried, law)
            return done

        return closed

    patch.setattr(verifier, "walk_targets", by_token)
    patch.setattr(verifier, "walk_rejection", by_law(walk_rejection))
    patch.setattr(verifier, "walk_block", by_law(walk_block))


def lenient(excess: float) -> Plant:
    """Children are accepted too readily."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        judge = rules._judge

        def lenient_judge(drafts, siblings, target, uniform):
            return judge(drafts, siblings, target, lambda node: uniform(node) / (1 + excess))

        patch.setattr(rules, "_judge", lenient_judge)

    return plant


def picky_children(patch: pytest.MonkeyPatch) -> None:
    """The drafter drops a child that looks unlikely after it was drawn."""
    propose = grow.DrawnGrowth.proposal

    def proposal(self):
        whole = propose(self)
        tree = whole.tree
        laws = whole.laws.numpy()
        own = np.array([laws[law, t] for law, t in zip(whole.law_of, tree.token, strict=True)])
        keep = own > 0.15
        for node, parent in enumerate(tree.parent):
            keep[node] &= parent < 0 or keep[parent]
        return whole.subtree(keep)

    patch.setattr(grow.DrawnGrowth, "proposal", proposal)
