"""The engine end to end on tiny random models: the text must be plain decoding's."""

from __future__ import annotations

import functools
import itertools
import math
import string
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import dspark
from dspark.adapters.hf.target import HFTarget
from dspark.draft.base import Drafter
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import FinishReason, Rule, SamplingParams
from dspark.text import TextCodec
from tests.conftest import VOCAB, random_model, random_target

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [20, 21, 22, 23] * 6, [40, 3, 41, 3, 42, 3, 41, 3]]


def make_codec() -> TextCodec:
    """Characters as tokens: id 3 is the first printable one."""
    letters = (string.ascii_letters + string.digits + " .,:;!?-+*/=()[]{}<>_'\"#@&%|~^")[:93]
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(letters)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.decoder = tokenizers.decoders.Fuse()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    return TextCodec(fast)


def model(family: str = "llama", *, exact: bool = True) -> HFTarget:
    """One layer where layers are alike: the engine knows nothing of them."""
    layers = 1 if family in ("llama", "qwen3_moe") else None
    return random_target(family, exact=exact, layers=layers)


@functools.cache
def drafter(name: str, family: str = "llama") -> Drafter | None:
    if name == "none":
        return None
    if name == "lookup":
        return LookupDrafter()
    if name == "model":
        # Gemma 4's last layers share K/V of the others.
        layers = {"llama": 2, "qwen3_moe": 2, "gemma4": None}.get(family, 3)
        return ModelDrafter(random_target(family, layers=layers, exact=False), vocab_size=VOCAB)
    if name == "itself":
        return ModelDrafter(model(family, exact=False), vocab_size=VOCAB)
    return CombinedDrafter(LookupDrafter(), drafter("model", family))


def engine(
    name: str = "none", family: str = "llama", *, codec: bool = False, **config: object
) -> dspark.Engine:
    settings = {"auto_off": False, **config}
    return dspark.Engine(
        model(family),
        drafter=drafter(name, family),
        codec=make_codec() if codec else None,
        config=dspark.EngineConfig(**settings),
    )


def tokens_of(engine: dspark.Engine, params: SamplingParams, prompts: object = PROMPTS) -> list:
    return [result.token_ids for result in engine.generate(prompts, params)]


SAMPLING = {
    "greedy": SamplingParams(max_tokens=8),
    "T1": SamplingParams(max_tokens=8, temperature=1.0, seed=3),
    "T.7 top": SamplingParams(max_tokens=8, temperature=0.7, top_k=20, top_p=0.9, seed=4),
    "min-p": SamplingParams(max_tokens=8, temperature=1.3, min_p=0.05, seed=4),
    "penalties": SamplingParams(
        max_tokens=8,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={9: 2.0, 30: -100.0},
    ),
    "match": SamplingParams(max_tokens=8, temperature=1.0, seed=3, rule="sample-match"),
}
TREES = {"chain": {"width": 1}, "tiny": {"tree_budget": 1}, "big": {"tree_budget": 31}}


@functools.cache
def plain(sampling: str, family: str) -> list:
    return tokens_of(engine("none", family), SAMPLING[sampling])


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *itertools.product(["combined"], SAMPLING),  # what is mostly wrong
        *itertools.product(["itself"], ["greedy", "T1"]),  # all of it right
        # How the law is shaped is in the first ones, and both drafts are.
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                *itertools.product(["itself"], ["T.7 top", "min-p", "penalties", "match"]),
                *itertools.product(["lookup", "model"], ["T1", "penalties"]),
            )
        ),
    ],
)
def test_the_tokens_are_those_of_plain_decoding(name: str, sampling: str) -> None:
    assert tokens_of(engine(name), SAMPLING[sampling]) == plain(sampling, "llama")


@pytest.mark.parametrize(
    ("tree", "sampling"),
    [
        ("chain", "T1"),
        ("tiny", "greedy"),
        ("big", "T1"),
        pytest.param("chain", "greedy", marks=pytest.mark.slow),
        pytest.param("tiny", "T1", marks=pytest.mark.slow),
        pytest.param("big", "greedy", marks=pytest.mark.slow),
    ],
)
def test_the_shape_of_the_tree_does_not_show_in_the_tokens(tree: str, sampling: str) -> None:
    params = replace(SAMPLING[sampling], **TREES[tree])
    assert tokens_of(engine("combined"), params) == plain(sampling, "llama")


# Rows of every family are compared with stock ones in adapters/test_parity.py.
@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        pytest.param("gemma2", "greedy", marks=pytest.mark.slow),
        pytest.param("gemma3", "T1", marks=pytest.mark.slow),
        ("gemma4", "T1"),
        pytest.param("qwen2", "T1", marks=pytest.mark.slow),
        ("qwen3_moe", "greedy"),
        pytest.param("mistral", "T1", marks=pytest.mark.slow),
    ],
)
def test_the_tokens_are_those_of_plain_decoding_on_every_family(family: str, sampling: str) -> None:
    assert tokens_of(engine("combined", family), SAMPLING[sampling]) == plain(sampling, family)


def test_a_draft_that_is_the_target_is_accepted_and_saves_rounds() -> None:
    """Without this the tests above could pass with a drafter that never proposes."""
    # A budget of its own is never trimmed by measured times.
    params = SamplingParams(max_tokens=24, ignore_eos=True, width=1, tree_budget=15)
    results = engine("itself").generate(PROMPTS, params)
    for result in results:
        assert result.stats.accepted_length > 2
        assert result.stats.accepted == result.stats.verified > 0
        assert result.stats.committed == 23
        assert result.stats.accepted == 23 - result.stats.rounds


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_rejection_gives_the_same_text_again(rule: str) -> None:
    width = 1 if rule == "block" else None
    params = SamplingParams(
        max_tokens=8, temperature=1.0, seed=5, rule=rule, tree_budget=6, width=width
    )
    prompts = PROMPTS[:3]
    first = tokens_of(engine("model"), params, prompts)
    assert tokens_of(engine("model"), params, prompts) == first
    alone = [tokens_of(engine("model"), params, [prompt])[0] for prompt in prompts]
    assert alone == first


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("none", "greedy"),
        pytest.param("combined", "greedy", marks=pytest.mark.slow),
        ("combined", "T1"),
    ],
)
def test_a_request_alone_and_in_a_batch_of_16_gives_the_same_text(name: str, sampling: str) -> None:
    prompts = [PROMPTS[i % 4][: 1 + i % 5] + [3 + i] * (1 + 7 * i) for i in range(16)]
    together = tokens_of(engine(name), SAMPLING[sampling], prompts)
    for prompt, tokens in zip(prompts[::5], together[::5], strict=True):
        assert tokens_of(engine(name), SAMPLING[sampling], [prompt]) == [tokens]


def test_greedy_is_transformers_generate() -> None:
    stock = random_model("llama", layers=1)
    texts = tokens_of(engine("model"), SamplingParams(max_tokens=14))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        expected = stock.generate(
            torch.tensor([prompt]), max_new_tokens=14, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert text == expected


def test_chunked_prefill_and_waiting_requests_change_nothing() -> None:
    prompts = [[3 + (i * k) % 90 for i in range(50 + 9 * k)] for k in range(7)]
    limits = dspark.RoundLimits(prefill_chunk=16)
    small = engine("lookup", max_batch=2, limits=limits)
    assert tokens_of(small, SAMPLING["T1"], prompts) == tokens_of(engine(), SAMPLING["T1"], prompts)


def test_samples_share_the_prompt_and_differ() -> None:
    prompt = [[3 + i % 90 for i in range(300)]]
    params = SamplingParams(max_tokens=12, temperature=1.0, n=3, seed=1)
    results = engine().generate(prompt, params)
    assert [r.sample_index for r in results] == [0, 1, 2]
    assert len({tuple(r.token_ids) for r in results}) == 3
    assert [r.stats.shared_prefix for r in results] == [0, 299, 299]
    assert tokens_of(engine("lookup"), params, prompt) == [r.token_ids for r in results]


def test_without_a_seed_texts_differ_and_the_seed_is_told() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5)
    one, two = engine().generate([[5, 6], [5, 6]], params)
    assert one.token_ids != two.token_ids
    again = SamplingParams(max_tokens=12, temperature=1.5, seed=one.seed)
    assert engine().generate([[5, 6]], again)[0].token_ids == one.token_ids


@pytest.mark.parametrize("name", ["none", "itself"])
def test_an_end_token_ends_the_text_wherever_it_falls(name: str) -> None:
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=0, logit_bias={2: 4.0})
    for result in engine(name).generate(PROMPTS * 3, params):
        assert result.token_ids.count(2) == 1
        assert result.token_ids[-1] == 2
        assert result.finish_reason is FinishReason.STOP
        stats = result.stats
        assert stats.committed == len(result.token_ids) - 1
        assert sum(stats.accepted_at_depth) == stats.accepted <= stats.committed


@pytest.mark.parametrize("count", range(1, 8))
def test_max_tokens_is_kept_to_the_token(count: int) -> None:
    (result,) = engine("itself").generate([[5, 6]], SamplingParams(max_tokens=count))
    assert len(result.token_ids) == count
    assert result.finish_reason is FinishReason.LENGTH


def test_the_context_limit_ends_the_text() -> None:
    prompt = [3 + i % 90 for i in range(2040)]
    for name in ("none", "itself", "lookup"):
        (result,) = engine(name).generate([prompt], SamplingParams(max_tokens=80, ignore_eos=True))
        assert len(result.token_ids) == 8
        assert result.finish_reason is FinishReason.LENGTH
        assert result.error is None


@pytest.mark.parametrize("name", ["none", "itself"])
def test_a_stop_string_ends_the_text_before_itself(name: str) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    (full,) = engine(name, codec=True).generate([[5, 6]], params)
    stop = full.text[11:14]
    cut = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop, "never seen"))
    (result,) = engine(name, codec=True).generate([[5, 6]], cut)
    assert result.text == full.text[: full.text.index(stop)]
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == full.token_ids[: len(result.text) + 3]


@pytest.mark.parametrize("name", ["none", "itself"])
def test_a_stream_gives_the_text_of_generate_and_never_part_of_a_stop_string(name: str) -> None:
    (full,) = engine(name, codec=True).generate([[5, 6]], SamplingParams(max_tokens=30))
    stop = full.text[15:19]
    params = SamplingParams(max_tokens=30, stop=(stop,))
    chunks = list(engine(name, codec=True).stream([5, 6], params))
    text = "".join(chunk.text for chunk in chunks)
    assert text == full.text[: full.text.index(stop)]
    assert chunks[-1].result is not None
    assert chunks[-1].result.text == text
    assert [t for chunk in chunks for t in chunk.token_ids] == chunks[-1].result.token_ids
    drafted = any(p.is_drafted for chunk in chunks for p in chunk.pieces)
    assert drafted == (name == "itself")


@pytest.mark.parametrize("name", ["none", "itself", "lookup"])
def test_logprobs_are_those_of_the_target(name: str) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=2, logprobs=3, top_k=10)
    (result,) = engine(name).generate([PROMPTS[0]], params)
    ids = torch.tensor([PROMPTS[0] + result.token_ids])
    with torch.no_grad():
        rows = random_model("llama", layers=1)(ids).logits[0].log_softmax(-1)
    for i, (token, entry) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        row = rows[len(PROMPTS[0]) - 1 + i]
        assert entry.token_id == token
        assert math.isclose(entry.logprob, row[token], abs_tol=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_bad_words_do_not_appear() -> None:
    (full,) = engine("itself", codec=True).generate([[5, 6]], SamplingParams(max_tokens=20))
    word = full.text[5:7]
    params = SamplingParams(max_tokens=20, bad_words=(word,))
    (result,) = engine("itself", codec=True).generate([[5, 6]], params)
    assert word not in result.text
    assert result.token_ids == tokens_of(engine(codec=True), params, [[5, 6]])[0]


def test_requests_join_leave_and_are_cancelled_between_rounds() -> None:
    params = SamplingParams(max_tokens=16)
    alone = tokens_of(engine("lookup"), params, PROMPTS[:3])
    shared = engine("lookup")
    first = shared.submit(PROMPTS[0], params)[0]
    for _ in range(3):
        shared.step()
    second = shared.submit(PROMPTS[1], params)[0]
    doomed = shared.submit(PROMPTS[2], params)[0]
    for _ in range(4):
        shared.step()
    shared.cancel(doomed)
    while shared.num_unfinished:
        shared.step()
    assert [first.result().token_ids, second.result().token_ids] == alone[:2]
    assert doomed.result().finish_reason is FinishReason.CANCELLED
    assert doomed.result().token_ids == alone[2][: len(doomed.result().token_ids)]


def test_a_closed_stream_gives_its_slot_back() -> None:
    busy = engine("itself")
    stream = busy.stream([5, 6], SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    assert busy.num_unfinished == 0


def test_a_bad_prompt_fails_alone() -> None:
    few = SamplingParams(max_tokens=3)
    results = engine().generate([[5], [], [VOCAB], "text", [6], [3] * 2048], few)
    errors = [result.error for result in results]
    assert errors[0] is None
    assert errors[4] is None
    assert "empty" in errors[1]
    assert f"token id {VOCAB} is outside the vocabulary, 0 to {VOCAB - 1}" in errors[2]
    assert "no tokenizer" in errors[3]
    assert "2048 tokens" in errors[5]
    assert results[4].token_ids


def test_a_memory_limit_queues_requests_and_refuses_what_can_never_fit() -> None:
    page = model().new_cache().page_bytes()
    small = engine("lookup", memory_limit=2 * page)
    params = SamplingParams(max_tokens=20)
    assert tokens_of(small, params) == tokens_of(engine(), params)
    (result,) = small.generate([[5]], SamplingParams(max_tokens=800))
    assert "K/V cache" in result.error


class BrokenDrafter:
    """Raises, or answers with nonsense."""

    name = "broken"
    capture = ()

    def propose(self, contexts: object) -> list:
        raise RuntimeError("no weights today")

    def release(self, request_id: int) -> None:
        pass


def test_a_broken_drafter_costs_speed_and_not_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    broken = dspark.Engine(model(), drafter=BrokenDrafter())
    params = SamplingParams(max_tokens=20)
    assert tokens_of(broken, params) == tokens_of(engine(), params)
    assert sum("decoding plainly" in record.message for record in caplog.records) == 1


def test_statistics_add_up() -> None:
    limits = dspark.RoundLimits(keep_rounds=True)
    for result in engine("combined", limits=limits).generate(PROMPTS, SAMPLING["T1"]):
        stats = result.stats
        assert stats.rounds == len(stats.round_log)
        assert stats.committed == len(result.token_ids) - 1  # prefill yields the first token
        assert stats.committed == sum(r.committed for r in stats.round_log)
        assert stats.verified == sum(r.verified for r in stats.round_log)
        assert stats.accepted == sum(stats.accepted_at_depth)
        assert stats.accepted_length == stats.committed / stats.rounds


def test_auto_off_lets_drafting_begin_after_plain_steps() -> None:
    """Plain steps alone say nothing of what a drafted row costs; they must not forbid drafting."""
    prompt = [[5, 6, 7, 8]]
    params = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={9: 8.0})
    (result,) = engine("lookup", auto_off=True).generate(prompt, params)
    assert result.stats.verified > 0
    assert result.stats.accepted > 20


def test_auto_off_stops_drafting_while_it_loses() -> None:
    class Garbage:
        name = "garbage"
        capture = ()
        calls = itertools.count()

        def propose(self, contexts: list) -> list:
            import time

            from dspark.tree import DraftTree, Proposal

            next(self.calls)
            time.sleep(0.01)
            tree = DraftTree.build([1] * 4, [-1, 0, 1, 2])
            return [Proposal(tree)] * len(contexts)

        def release(self, request_id: int) -> None:
            pass

    params = SamplingParams(max_tokens=80, ignore_eos=True)
    garbage = Garbage()
    off = dspark.Engine(model(), drafter=garbage)
    (result,) = off.generate([[5, 6]], params)
    assert result.stats.speculation_switched_off > 0
    assert next(garbage.calls) < 40
    assert result.token_ids == tokens_of(engine(), params, [[5, 6]])[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 2.0),
        ("max_tokens", 0),
        ("n", 0),
        ("seed", -1),
        ("stop", ("",)),
        ("logprobs", -1),
        ("rule", "lenient"),
        ("tree_budget", -1),
        ("width", 0),
        ("depth", 0),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 3.0),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(dspark.ConfigError, match=field):
        SamplingParams(**{field: value})


def test_a_rule_that_contradicts_the_temperature_is_an_error_of_the_prompt() -> None:
    params = SamplingParams(temperature=1.0, rule="greedy")
    (result,) = engine().generate([[5]], params)
    assert "greedy needs 0" in result.error
    assert SamplingParams(temperature=1.0).resolved_rule is Rule.COUPLED


def test_prompts_must_be_a_list() -> None:
    with pytest.raises(dspark.ConfigError, match="must be a list"):
        engine().generate("hello")


def test_a_shared_prefix_never_makes_a_request_fail() -> None:
    """A shared page holds its donor's whole segment, so dropping the donor frees nothing."""
    page = model().new_cache().page_bytes()
    prompt = [3 + i % 90 for i in range(503)]
    params = SamplingParams(max_tokens=240, ignore_eos=True)
    small = engine(memory_limit=3 * page)
    first = small.submit(prompt, params)[0]
    for _ in range(20):
        small.step()
    small.cancel(first)
    longer = SamplingParams(max_tokens=30, ignore_eos=True)  # into the third page
    (result,) = small.generate([[*prompt[:500], 9, 9, 9]], longer)
    assert result.error is None


def test_a_drafted_row_that_is_not_finite_does_not_fail_the_request() -> None:
    class Target:
        """Gives NaN for rows past the first of a tree, as an overflowing nonsense token would."""

        def __init__(self) -> None:
            self.inner = model()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def forward(self, batch: object, cache: object, *, capture: tuple = ()) -> object:
            output = self.inner.forward(batch, cache, capture=capture)
            if len(batch.output_rows) == 1:
                return output
            logits = output.logits.clone()
            logits[1:] = float("nan")
            return replace(output, logits=logits)

    params = SamplingParams(max_tokens=12)
    broken = dspark.Engine(Target(), drafter=drafter("itself"))
    (result,) = broken.generate([[5, 6]], params)
    assert result.error is None
    assert result.token_ids == tokens_of(engine(), params, [[5, 6]])[0]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (5, "of type int"),
        ([1, "x", 4], "holds 'x'"),
        ([1, 2.5], "holds 2.5"),
        ([True, 2], "holds True"),
        ([{"role": "user", "content": "hi"}], "no tokenizer"),
    ],
)
def test_a_prompt_of_the_wrong_kind_is_an_error_of_its_own(prompt: object, words: str) -> None:
    own = engine()
    results = own.generate([[5, 6], prompt], SamplingParams(max_tokens=2))
    assert results[0].error is None
    assert words in results[1].error
    assert own.num_unfinished == 0


def test_token_ids_may_be_numpy_integers() -> None:
    ids = np.array([5, 6, 7])
    params = SamplingParams(max_tokens=4)
    assert tokens_of(engine(), params, [ids]) == tokens_of(engine(), params, [[5, 6, 7]])


class UnrulyDrafter(BrokenDrafter):
    """Offers more than was asked for."""

    def propose(self, contexts: list) -> list:
        from dspark.tree import DraftTree, Proposal

        tree = DraftTree.build([1] * 50, range(-1, 49))
        return [Proposal(tree)] * len(contexts)


class IndexDrafter(BrokenDrafter):
    """Has a bug."""

    def propose(self, contexts: list) -> list:
        return [contexts[99]]


@pytest.mark.parametrize("kind", [UnrulyDrafter, IndexDrafter])
def test_a_drafter_with_a_bug_costs_speed_and_not_the_answer(kind: type) -> None:
    params = SamplingParams(max_tokens=8)
    assert tokens_of(dspark.Engine(model(), drafter=kind()), params) == tokens_of(engine(), params)


@pytest.mark.parametrize("name", ["tree_budget", "depth", "max_rows", "prefill_chunk"])
def test_sizes_of_a_round_are_checked(name: str) -> None:
    with pytest.raises(dspark.ConfigError, match=name):
        dspark.RoundLimits(**{name: -1})
