"""The batched verifier: logits of many requests' trees in, one verdict per request out.

All rows are shaped in one call; requests whose rule compares tokens share one computation of the
target's tokens per rule, with one copy to the host; laws are computed only for requests whose rule
compares laws, and only at the rows their walk reaches. A request with a grammar is judged by
itself, row by row as its walk goes on, since every row needs a mask. An empty tree (a plain step,
or the token that prefill yields) goes the same way, so plain decoding under a rule is the same
function.

Letters: M rows of logits, V vocabulary, N nodes of one tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import ConfigError, ShapeError
from dspark.request import Rule, SamplingParams
from dspark.tree import DraftTree, Proposal
from dspark.verify.constraint import AllowedAfter
from dspark.verify.likeliest import check_finite, likeliest, likeliest_unshaped
from dspark.verify.noise import NoiseKey, Stream, perturbed_argmax, state_of, uniform
from dspark.verify.noise_rows import scaled_argmax
from dspark.verify.rules import CLOSING, draw, walk_block, walk_rejection, walk_targets
from dspark.verify.sampling import (
    History,
    changes_nothing,
    has_history,
    law_of_row,
    only_scales,
    scale_of,
    shape_logits,
)

__all__ = ["Verdict", "VerifyJob", "verify"]

FloatArray = NDArray[np.float64]
HalfArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def _no_proposal() -> Proposal:
    none = np.zeros(0, dtype=np.int64)
    return Proposal(DraftTree(none, none, none, np.zeros(0, dtype=np.float64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyJob:
    """One request's part of a verify batch.

    Attributes:
        start: Row of `logits` that belongs to the anchor; those of the N nodes follow it in index
            order.
        params: The request's sampling parameters.
        rule: The rule in force. At temperature 0 every rule draws the largest logit.
        noise: Key of the request's noise.
        position: Output position of the token that follows the anchor, >= 0; 0 after prefill.
        round: Number of this round, >= 0.
        proposal: The tree and its laws; empty for a plain step.
        prompt: Prompt token ids.
        output: Token ids generated so far, the anchor included.
        bad_words: Token sequences that must not appear.
        allowed: The masks of the request's grammar, None without one.

    Raises:
        ConfigError: If start, position or round is negative.
    """

    start: int
    params: SamplingParams
    rule: Rule
    noise: NoiseKey
    position: int
    round: int = 0
    proposal: Proposal = field(default_factory=_no_proposal)
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    allowed: AllowedAfter | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.start >= 0 and self.position >= 0 and self.round >= 0:
            return
        for name in ("start", "position", "round"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name} is {value}, but must be an integer >= 0.")

    @property
    def num_rows(self) -> int:
        """Rows of logits that the job uses: the anchor's and one per node."""
        return len(self.proposal.tree.token) + 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification decided for one request.

    Attributes:
        path: Accepted node indices, root to leaf.
        closing: The recovered or bonus token that ends the round.
        tried: Candidates looked at, at depth 1, 2, ... (under the block rule, the chain's tokens).
    """

    path: tuple[int, ...]
    closing: int
    tried: tuple[int, ...] = ()

    @property
    def accept_len(self) -> int:
        """Drafted tokens accepted."""
        return len(self.path)

    @property
    def tried_depth(self) -> int:
        """Deepest depth at which a candidate was looked at."""
        return len(self.tried)


def verify(
    logits: Tensor, jobs: Sequence[VerifyJob], tops: IntArray | None = None
) -> list[Verdict]:
    """Judge the trees of several requests.

    Args:
        logits: float [M, V] of the target, any floating dtype, raw.
        jobs: One per request; a row may belong to one job only.
        tops: `dspark.target.TargetOutput.tops` of these logits, if they are known.

    Returns:
        One verdict per job, in order. Each is a function of its own job and rows alone.

    Raises:
        ShapeError: If a job's rows lie outside `logits`, or its tree and laws do not fit together.
        CapabilityError: If logits are NaN or infinite, or no token can be drawn.
        ConfigError: If a rule cannot verify the tree it was given.
        DataError: If a draft law is not a law.
    """
    free = [job for job in jobs if job.allowed is None]
    judged = _verify_free(logits, free, tops)
    if len(free) == len(jobs):
        return judged
    others = iter(judged)
    return [
        next(others) if job.allowed is None else _verify_constrained(logits, job) for job in jobs
    ]


def _verify_free(logits: Tensor, jobs: Sequence[VerifyJob], tops: IntArray | None) -> list[Verdict]:
    """Judge the trees of requests without a grammar together."""
    if not jobs:
        return []
    if all(_takes_likeliest(job) for job in jobs):
        rows = _rows_of(logits, jobs)
        tokens = tops.tolist() if tops is not None and rows is logits else [-1]
        if min(tokens) < 0:
            tokens = likeliest_unshaped(rows)
        return _verify_unshaped(tokens, jobs)
    drawn = _drawn(logits, jobs)
    if drawn is not None:
        return _verify_unshaped(drawn, jobs)
    starts = np.cumsum([0, *(job.num_rows for job in jobs)])
    shaped = _shape(_rows_of(logits, jobs), jobs)
    verdicts: dict[int, Verdict] = {}
    for stream, members in _by_stream(jobs).items():
        parts = [np.arange(starts[j], starts[j + 1]) for j in members]
        tokens = _target_tokens(shaped, np.concatenate(parts), [jobs[j] for j in members], stream)
        at = 0
        for j in members:
            n = jobs[j].num_rows
            path, tried, closing = walk_targets(jobs[j].proposal.tree, tokens[at : at + n])
            verdicts[j] = Verdict(path, closing, tried)
            at += n
    by_law = [j for j in range(len(jobs)) if j not in verdicts]
    for j in by_law:
        host: HalfArray = shaped[starts[j] : starts[j + 1]].detach().to("cpu").numpy()
        verdicts[j] = _verify_by_law(host.__getitem__, jobs[j])
    return [verdicts[j] for j in range(len(jobs))]


def _takes_likeliest(job: VerifyJob) -> bool:
    """Whether a job takes the largest logit of rows that no parameter changes."""
    takes_tokens = not job.rule.draws_from_laws and _stream_of(job) is None
    return takes_tokens and changes_nothing(job.params, job.bad_words)


def _drawn(logits: Tensor, jobs: Sequence[VerifyJob]) -> list[int] | None:
    """The target's tokens at the rows of jobs that draw with noise under a temperature alone.

    None where a job is of another kind, or a row wants a closer look.
    """
    scales: list[float] = []
    states: list[int] = []
    for job in jobs:
        stream = None if job.rule.draws_from_laws else _stream_of(job)
        if stream is None or job.bad_words or not only_scales(job.params):
            return None
        positions = [job.position, *(job.position + job.proposal.tree.depth).tolist()]
        scales += [scale_of(job.params)] * len(positions)
        known = {at: state_of(job.noise, stream, at) for at in set(positions)}
        states += [known[at] for at in positions]
    return scaled_argmax(_rows_of(logits, jobs), scales, states)


def _verify_unshaped(tokens: Sequence[int], jobs: Sequence[VerifyJob]) -> list[Verdict]:
    """Judge jobs that compare tokens, given the target's at each of their rows."""
    start = 0
    verdicts = []
    for job in jobs:
        n = job.num_rows
        path, tried, closing = walk_targets(job.proposal.tree, tokens[start : start + n])
        verdicts.append(Verdict(path, closing, tried))
        start += n
    return verdicts


def _verify_constrained(logits: Tensor, job: VerifyJob) -> Verdict:
    """Judge one tree, shaping only the rows that the walk comes to: each needs a mask."""
    rows = _RowsOnDemand(logits, job)
    if job.rule.draws_from_laws:
        return _verify_by_law(lambda row: rows.shaped(row)[0].detach().to("cpu").numpy(), job)
    path, tried, closing = walk_targets(job.proposal.tree, rows)
    return Verdict(path, closing, tried)


class _RowsOnDemand(Sequence[int]):
    """The target's tokens at the rows of one job, each computed when it is asked for."""

    def __init__(self, logits: Tensor, job: VerifyJob) -> None:
        self._logits = _rows_of(logits, [job])
        check_finite(self._logits)  # of rows too that no walk comes to: the cache holds them
        self._job = job
        self._known: dict[int, int] = {}
        self._paths = _paths(job.proposal.tree)
        self._depths = [0, *job.proposal.tree.depth.tolist()]

    def __len__(self) -> int:
        return self._job.num_rows

    @overload
    def __getitem__(self, row: int) -> int: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[int]: ...
    def __getitem__(self, row: int | slice) -> int | Sequence[int]:
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        if row not in self._known:
            self._known[row] = self._token(row)
        return self._known[row]

    def _token(self, row: int) -> int:
        job, shaped = self._job, self.shaped(row)
        stream = _stream_of(job)
        if stream is None:
            return likeliest(shaped)[0]
        at = job.position + self._depths[row]
        return int(perturbed_argmax(shaped, [job.noise], [at], stream=stream)[0])

    def shaped(self, row: int) -> Tensor:
        """Shaped logits of a row, float32 [1, V]."""
        job, path = self._job, self._paths[row]
        masks = None if job.allowed is None else [job.allowed(path)]
        return shape_logits(
            self._logits[row : row + 1],
            [job.params],
            [History(job.prompt, job.output)],
            [path],
            [job.bad_words],
            masks,
        )


def _rows_of(logits: Tensor, jobs: Sequence[VerifyJob]) -> Tensor:
    """Bring the jobs' rows together, in job order; no copy if they are already."""
    total = logits.shape[0] if logits.ndim == 2 else 0
    wanted: list[int] = []
    done, is_whole = 0, True
    for j, job in enumerate(jobs):
        stop = job.start + job.num_rows
        if stop > total:
            raise ShapeError(
                f"job {j} needs rows {job.start} to {stop - 1}, but logits are "
                f"{tuple(logits.shape)}."
            )
        is_whole = is_whole and job.start == done
        done = stop
    if is_whole and done == total:
        return logits
    for job in jobs:
        wanted.extend(range(job.start, job.start + job.num_rows))
    return logits[torch.tensor(wanted, device=logits.device)]


def _shape(logits: Tensor, jobs: Sequence[VerifyJob]) -> Tensor:
    """Shape the rows of all jobs in one call."""
    params: list[SamplingParams] = []
    for job in jobs:
        params += [job.params] * job.num_rows
    if not any(has_history(job.params, job.bad_words) for job in jobs):
        return shape_logits(logits, params)
    histories: list[History] = []
    paths: list[Sequence[int]] = []
    bad_words: list[Sequence[Sequence[int]]] = []
    for job in jobs:
        rows = job.num_rows
        histories += [History(job.prompt, job.output)] * rows
        bad_words += [job.bad_words] * rows
        needs_paths = has_history(job.params, job.bad_words)
        paths += _paths(job.proposal.tree) if needs_paths else [()] * rows
    return shape_logits(logits, params, histories, paths, bad_words)


def _paths(tree: DraftTree) -> list[Sequence[int]]:
    """List the tokens from the anchor's child down to each row's own."""
    paths: list[Sequence[int]] = [()]
    for token, parent in zip(tree.token.tolist(), tree.parent.tolist(), strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


def _by_stream(jobs: Sequence[VerifyJob]) -> dict[Stream | None, list[int]]:
    """Group the token-comparing jobs by the noise they add; None for no noise."""
    groups: dict[Stream | None, list[int]] = {}
    for j, job in enumerate(jobs):
        if not job.rule.draws_from_laws:
            groups.setdefault(_stream_of(job), []).append(j)
    return groups


def _stream_of(job: VerifyJob) -> Stream | None:
    """The noise that a token-comparing job adds; None for no noise."""
    if job.params.temperature == 0 or job.rule is Rule.GREEDY:
        return None
    return Stream.COUPLED if job.rule is Rule.COUPLED else Stream.MATCH


def _target_tokens(
    shaped: Tensor, rows: NDArray[np.int64], jobs: Sequence[VerifyJob], stream: Stream | None
) -> list[int]:
    """Compute the target's token at each of the jobs' rows."""
    if len(rows) < shaped.shape[0]:
        shaped = shaped[torch.from_numpy(rows).to(shaped.device)]
    if stream is None:
        return likeliest(shaped)
    keys: list[NoiseKey] = []
    positions: list[int] = []
    for job in jobs:
        keys += [job.noise] * job.num_rows
        positions += [job.position, *(job.position + job.proposal.tree.depth).tolist()]
    tokens: list[int] = perturbed_argmax(shaped, keys, positions, stream=stream).tolist()
    return tokens


def _verify_by_law(shaped: Callable[[int], HalfArray], job: VerifyJob) -> Verdict:
    """Judge one tree against the target's laws, computing those that the walk asks for.

    Args:
        shaped: Row of the tree -> its shaped logits, float32 [V].
        job: The tree.
    """
    is_greedy = job.params.temperature == 0

    def target_law(row: int) -> FloatArray:
        return law_of_row(shaped(row), is_greedy=is_greedy)

    def uniform_of(node: int) -> float:
        # The position tells the token after prefill from the first round's, whatever the caller
        # counts as a round there.
        return uniform(job.noise, job.round, node, job.position)

    rule = walk_rejection if job.rule is Rule.REJECTION else walk_block
    walk = rule(job.proposal, target_law, uniform_of)
    return Verdict(walk.path, draw(walk.law, uniform_of(CLOSING)), walk.tried)
