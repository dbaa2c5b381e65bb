"""The public verifier: plain and speculative decoding give the same text or the same law."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from dspark.errors import CapabilityError, ConfigError, ShapeError
from dspark.request import Rule, SamplingParams
from dspark.tree import DraftTree, Proposal
from dspark.verify.noise import NoiseKey, draft_topk, perturbed_argmax
from dspark.verify.sampling import History, laws, shape_logits
from dspark.verify.verifier import Verdict, VerifyJob, verify

V, HORIZON, SAMPLES = 5, 4, 100_000
PROMPT = [1, 3]
PLAIN = SamplingParams(temperature=1.0)
FULL = SamplingParams(
    temperature=0.8,
    top_k=4,
    top_p=0.97,
    min_p=0.02,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
)
EMPTY = DraftTree(*[np.zeros(0, np.int64)] * 3, survival=np.zeros(0))


def logits_after(output: Sequence[int], model: int = 0) -> torch.Tensor:
    """Raw logits [V] of a toy model that looks at its whole output."""
    return _logits_after(tuple(output), model).clone()


@functools.cache
def _logits_after(output: tuple[int, ...], model: int) -> torch.Tensor:
    rng = np.random.default_rng([model, len(output), *output])
    return torch.from_numpy(1.2 * rng.normal(size=V)).float()


def shaped_after(output: Sequence[int], params: SamplingParams, model: int = 0) -> torch.Tensor:
    history = [History(PROMPT, list(output))]
    return shape_logits(logits_after(output, model)[None], [params], history)[0]


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    depth: list[int] = []
    for p in parents:
        depth.append(1 if p < 0 else depth[p] + 1)
    arrays = [np.array(x, dtype=np.int64) for x in (tokens, parents, depth)]
    return DraftTree(*arrays, survival=np.ones(len(tokens)))


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.token.tolist(), tree.parent.tolist(), strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


def rows_for(tree: DraftTree, output: Sequence[int]) -> torch.Tensor:
    return torch.stack([logits_after([*output, *path]) for path in paths_of(tree)])


def random_tree(rng: np.random.Generator, size: int) -> DraftTree:
    parents = [int(rng.integers(-1, i)) for i in range(size)]
    return tree_of(rng.integers(0, V, size).tolist(), parents)


def decode(
    params: SamplingParams, rule: Rule, seed: int, length: int, tree_seed: int | None
) -> list[int]:
    """Generate with random trees (duplicates among siblings included), or plainly."""
    rng = np.random.default_rng(tree_seed)
    output: list[int] = []
    for index in range(10**6):
        size = int(rng.integers(0, 20)) if tree_seed is not None and output else 0
        tree = random_tree(rng, size)
        job = VerifyJob(
            start=0,
            params=params,
            rule=rule,
            noise=NoiseKey(seed),
            position=len(output),
            round=index,
            proposal=Proposal(tree),
            prompt=PROMPT,
            output=tuple(output),
            bad_words=[[2, 2], [0, 1, 4]],
        )
        verdict = verify(rows_for(tree, output), [job])[0]
        output += [int(tree.token[n]) for n in verdict.path] + [verdict.closing]
        if len(output) >= length:
            break
    return output[:length]


@pytest.mark.parametrize("rule", [Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH])
@pytest.mark.parametrize(
    "params",
    [pytest.param(PLAIN, id="plain", marks=pytest.mark.slow), pytest.param(FULL, id="full")],
)
def test_any_tree_gives_the_text_of_plain_decoding(rule: Rule, params: SamplingParams) -> None:
    if rule is Rule.GREEDY:
        params = SamplingParams(repetition_penalty=params.repetition_penalty, presence_penalty=0.4)
    for seed in range(2):
        plain = decode(params, rule, seed, 24, None)
        assert (2, 2) not in itertools.pairwise(plain)
        for tree_seed in range(2):
            assert decode(params, rule, seed, 24, tree_seed) == plain


def test_coupled_text_is_the_perturbed_argmax_at_every_position() -> None:
    job = {"params": PLAIN, "rule": Rule.COUPLED, "noise": NoiseKey(4), "position": 7}
    tree = tree_of([0, 1, 2, 3, 4], [-1] * 5)
    rows = rows_for(tree, [])
    verdict = verify(rows, [VerifyJob(start=0, proposal=Proposal(tree), **job)])[0]
    first = int(perturbed_argmax(rows[:1], [NoiseKey(4)], [7]))
    second = int(perturbed_argmax(rows[1 + first][None], [NoiseKey(4)], [8]))
    assert (verdict.path, verdict.closing, verdict.tried) == ((first,), second, (first + 1,))
    assert (verdict.accept_len, verdict.tried_depth) == (1, 1)


def conditional_p(tokens: np.ndarray, law_after: dict[tuple[int, ...], np.ndarray]) -> float:
    """Smallest chi-square p-value of any position given any beginning, Bonferroni-corrected."""
    p_values = [1.0]
    codes = np.zeros(len(tokens), dtype=np.int64)  # of the beginnings, in the order of `product`
    for t in range(tokens.shape[1]):
        codes = codes * V + tokens[:, t]
        after = np.bincount(codes, minlength=V ** (t + 1)).reshape(-1, V)
        for context, counts in zip(itertools.product(range(V), repeat=t), after, strict=True):
            law, total = law_after[context], counts.sum()
            if (counts[law == 0] > 0).any():
                return 0.0
            big = law * total >= 5
            if big.sum() < 2:
                continue
            seen, want = counts[big], law[big] * total
            p_values.append(stats.chisquare(seen, want * seen.sum() / want.sum()).pvalue)
    return min(p_values) * len(p_values)


def law_table(params: SamplingParams, horizon: int) -> dict[tuple[int, ...], np.ndarray]:
    return {
        c: laws(shaped_after(c, params)[None])[0].numpy()
        for t in range(horizon)
        for c in itertools.product(range(V), repeat=t)
    }


def sample_plainly(params: SamplingParams, count: int) -> np.ndarray:
    """Coupled sampling of texts through the noise alone, half by seed, half by sample."""
    keys = [NoiseKey(i // 2, i % 2) for i in range(count)]
    tokens = np.zeros((count, HORIZON), dtype=np.int64)
    codes = np.zeros(count, dtype=np.int64)
    for t in range(HORIZON):
        table = torch.stack(
            [shaped_after(c, params) for c in itertools.product(range(V), repeat=t)]
        )
        shaped = table[torch.from_numpy(codes)]
        tokens[:, t] = perturbed_argmax(shaped, keys, [t] * count).numpy()
        codes = codes * V + tokens[:, t]
    return tokens


@pytest.mark.parametrize(
    ("params", "count"),
    [
        pytest.param(PLAIN, SAMPLES, id="plain", marks=pytest.mark.slow),
        pytest.param(FULL, SAMPLES, id="full", marks=pytest.mark.slow),
        pytest.param(FULL, 25_000, id="full, fewer"),
    ],
)
def test_plain_coupled_sampling_has_the_targets_law(params: SamplingParams, count: int) -> None:
    assert conditional_p(sample_plainly(params, count), law_table(params, HORIZON)) > 1e-4


@pytest.mark.parametrize("fault", [None, "temperature", "one noise", "no top-p", "2 % lenient"])
def test_teeth_the_chi_square_sees_planted_faults(fault: str | None) -> None:
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=1.0, top_p=0.97)
    noise = rng.gumbel(size=(SAMPLES, HORIZON, V))
    if fault == "one noise":
        noise[:] = noise[:, :1]
    broken = SamplingParams(
        temperature=1.05 if fault == "temperature" else 1.0,
        top_p=1.0 if fault == "no top-p" else 0.97,
    )
    tokens = np.zeros((SAMPLES, HORIZON), dtype=np.int64)
    codes = np.zeros(SAMPLES, dtype=np.int64)
    for t in range(HORIZON):
        contexts = itertools.product(range(V), repeat=t)
        table = np.stack([shaped_after(c, broken).double().numpy() for c in contexts])
        tokens[:, t] = (table[codes] + noise[:, t]).argmax(axis=1)
        if fault == "2 % lenient":
            best = table[codes].argmax(axis=1)
            tokens[:, t] = np.where(rng.random(SAMPLES) < 0.02, best, tokens[:, t])
        codes = codes * V + tokens[:, t]
    p = conditional_p(tokens, law_table(params, HORIZON))
    assert p > 1e-4 if fault is None else p < 1e-4


def draft_tree(
    widths: Sequence[int], keys: list[NoiseKey], index: int, outputs: list[tuple[int, ...]]
) -> list[Proposal]:
    """Draw every request's tree from the toy draft model, by levels, as a drafter would."""
    n = len(keys)
    tokens: list[list[int]] = [[] for _ in range(n)]
    parents: list[int] = []
    frontier, law_of = [-1], []
    rows: list[list[torch.Tensor]] = [[] for _ in range(n)]
    for width in widths:
        following = []
        for node in frontier:
            paths = [paths_of(tree_of(t, parents))[node + 1] for t in tokens]
            shaped = torch.stack(
                [logits_after((*o, *p), 1) for o, p in zip(outputs, paths, strict=True)]
            )
            ids, _ = draft_topk(shaped, keys, [index] * n, [node] * n, width)
            law = laws(shaped)
            law_of += [len(rows[0])] * width
            following += range(len(parents), len(parents) + width)
            parents += [node] * width
            for i in range(n):
                tokens[i] += ids[i].tolist()
                rows[i].append(law[i])
        frontier = following
    return [
        Proposal(tree_of(t, parents), torch.stack(r), np.array(law_of, dtype=np.int64))
        for t, r in zip(tokens, rows, strict=True)
    ]


def sample_by_rounds(
    params: SamplingParams, rule: Rule, widths: Sequence[int], horizon: int, count: int
) -> np.ndarray:
    """Prefill's token by an empty tree, then rounds until `horizon` tokens are there."""
    torch.set_num_threads(1)
    keys = [NoiseKey(9, s) for s in range(count)]
    outputs: list[tuple[int, ...]] = [() for _ in range(count)]
    for index in range(horizon):
        todo = [i for i in range(count) if len(outputs[i]) < horizon]
        if not todo:
            break
        proposals = [Proposal(EMPTY)] * len(todo)
        if index > 0:
            some = [outputs[i] for i in todo]
            proposals = draft_tree(widths, [keys[i] for i in todo], index - 1, some)
        jobs, rows = [], []
        for i, proposal in zip(todo, proposals, strict=True):
            job = VerifyJob(
                start=len(rows),
                params=params,
                rule=rule,
                noise=keys[i],
                position=len(outputs[i]),
                round=max(0, index - 1),  # as an engine that does not count the prefill
                proposal=proposal,
                prompt=PROMPT,
                output=outputs[i],
            )
            jobs.append(job)
            rows += [logits_after((*outputs[i], *p)) for p in paths_of(proposal.tree)]
        for i, job, verdict in zip(todo, jobs, verify(torch.stack(rows), jobs), strict=True):
            path = [int(job.proposal.tree.token[n]) for n in verdict.path]
            outputs[i] = (*outputs[i], *path, verdict.closing)
    return np.array([o[:horizon] for o in outputs])


def test_rejection_through_rounds_has_the_targets_law() -> None:
    """A quick look at the wiring; test_laws.py is exact, and the slow suite draws 100 000."""
    tokens = sample_by_rounds(PLAIN, Rule.REJECTION, (2,), 2, 2_000)
    assert conditional_p(tokens, law_table(PLAIN, 2)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "widths"),
    [
        (Rule.REJECTION, (1, 1)),
        (Rule.REJECTION, (2, 2)),
        (Rule.REJECTION, (4,)),
        (Rule.BLOCK, (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("params", [PLAIN, FULL], ids=["plain", "full"])
def test_every_law_rule_through_rounds_has_the_targets_law(
    params: SamplingParams, rule: Rule, widths: Sequence[int]
) -> None:
    tokens = sample_by_rounds(params, rule, widths, HORIZON, SAMPLES)
    assert conditional_p(tokens, law_table(params, HORIZON)) > 1e-4


def mixed_batch() -> tuple[torch.Tensor, list[VerifyJob]]:
    """A ragged batch: every rule, trees of 0 to 6 nodes, all kinds of parameters."""
    rng = np.random.default_rng(3)
    kinds = [
        (Rule.GREEDY, SamplingParams(presence_penalty=0.5)),
        (Rule.COUPLED, FULL),
        (Rule.SAMPLE_MATCH, PLAIN),
        (Rule.REJECTION, FULL),
        (Rule.BLOCK, PLAIN),
        (Rule.REJECTION, SamplingParams()),
        (Rule.COUPLED, SamplingParams()),
    ]
    jobs, rows = [], []
    for i in range(28):
        rule, params = kinds[i % len(kinds)]
        size = i % 7 if i >= 7 else 0
        chain = tree_of(rng.integers(0, V, size).tolist(), list(range(-1, size - 1)))
        tree = chain if rule is Rule.BLOCK else random_tree(rng, size)
        law = torch.from_numpy(rng.dirichlet(np.ones(V), size)) if rule.draws_from_laws else None
        proposal = Proposal(tree, law, np.arange(size))
        output = rng.integers(0, V, 3).tolist()
        job = VerifyJob(
            start=len(rows),
            params=params,
            rule=rule,
            noise=NoiseKey(i),
            position=3,
            round=2,
            proposal=proposal,
            prompt=PROMPT,
            output=output,
        )
        jobs.append(job)
        rows += list(rows_for(tree, output))
    return torch.stack(rows), jobs


def moved(job: VerifyJob, start: int) -> VerifyJob:
    fields = {name: getattr(job, name) for name in VerifyJob.__dataclass_fields__}
    return VerifyJob(**{**fields, "start": start})


def test_a_verdict_does_not_depend_on_the_batch() -> None:
    logits, jobs = mixed_batch()
    together = verify(logits, jobs)
    for job, verdict in zip(jobs, together, strict=True):
        rows = logits[job.start : job.start + job.num_rows]
        assert verify(rows, [moved(job, 0)]) == [verdict]
    assert verify(logits, jobs[::-1]) == together[::-1]
    assert verify(logits, jobs[3:9]) == together[3:9]


def test_an_empty_tree_draws_only_the_closing_token() -> None:
    for rule in Rule:
        params = SamplingParams() if rule is Rule.GREEDY else PLAIN
        job = VerifyJob(start=0, params=params, rule=rule, noise=NoiseKey(0), position=0)
        verdict = verify(torch.tensor([[-math.inf, 3.0, -math.inf]]), [job])[0]
        assert verdict == Verdict((), 1, ())
    assert verify(torch.zeros(0, 3), []) == []


def test_what_cannot_be_verified_is_an_error() -> None:
    job = VerifyJob(start=1, params=PLAIN, rule=Rule.COUPLED, noise=NoiseKey(0), position=0)
    with pytest.raises(ShapeError, match="rows 1 to 1"):
        verify(torch.zeros(1, 3), [job])
    for value in (math.nan, math.inf):
        bad = torch.full((2, 3), value)
        with pytest.raises(CapabilityError, match="largest logit"):
            verify(bad, [job])
    with pytest.raises(ConfigError, match="position"):
        VerifyJob(start=0, params=PLAIN, rule=Rule.COUPLED, noise=NoiseKey(0), position=-1)


def greedy_job(start: int, **options: object) -> VerifyJob:
    params = SamplingParams(temperature=0.0)
    return VerifyJob(
        start=start, params=params, rule=Rule.GREEDY, noise=NoiseKey(0), position=0, **options
    )


def test_tokens_found_with_the_logits_are_taken_for_those_rows() -> None:
    logits = torch.zeros(3, V)
    tops = np.array([4, 2, 3])  # not what the logits say, so that it shows who was asked
    verdicts = verify(logits, [greedy_job(row) for row in range(3)], tops)
    assert [verdict.closing for verdict in verdicts] == [4, 2, 3]


def test_rows_for_which_none_was_found_are_looked_at() -> None:
    logits = torch.zeros(2, V)
    logits[1, 2] = torch.nan
    with pytest.raises(CapabilityError, match="row 1 is nan"):
        verify(logits, [greedy_job(0), greedy_job(1)], np.array([0, -1]))


def test_requests_beside_one_with_a_grammar_keep_their_own_rows() -> None:
    logits = torch.eye(V)[[1, 2, 3]]
    bound = greedy_job(0, allowed=lambda path: np.arange(V) == 4)
    verdicts = verify(logits, [bound, greedy_job(1), greedy_job(2)], np.array([1, 2, 3]))
    assert [verdict.closing for verdict in verdicts] == [4, 2, 3]
