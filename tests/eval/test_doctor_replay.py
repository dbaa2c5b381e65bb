"""Replays: the same rounds as the engine runs, without the target."""

from __future__ import annotations

import pytest

import dspark
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.eval.acceptance import acceptance
from dspark.eval.doctor.replay import Place, Replay, ReplayConfig, compare, replay
from dspark.eval.doctor.variant_checks import shifted_layers
from dspark.request import SamplingParams
from dspark.rounds import RoundLimits
from tests.eval.doctor_pairs import MAX_TOKENS, Broken, Clock, Wrapped, fitted, target, texts

BUDGET, DEPTH = 7, 4


@pytest.mark.parametrize(("kind", "width"), [("dflash", None), ("lookup", 1)])
def test_a_replay_has_the_rounds_of_the_engine(kind: str, width: int | None) -> None:
    """The engine verifies with the target; the replay knows what it would say."""

    def drafter() -> dspark.draft.base.Drafter:
        return DSparkDrafter(fitted(8, 2), name="dflash") if kind == "dflash" else LookupDrafter()

    traces = texts(2)
    limits = RoundLimits(keep_rounds=True)
    config = dspark.EngineConfig(auto_off=False, max_batch=1, limits=limits)
    engine = dspark.Engine(target(), drafter=drafter(), config=config)
    params = SamplingParams(max_tokens=MAX_TOKENS, depth=DEPTH, width=width, tree_budget=BUDGET)
    prompts = [list(trace.tokens[: trace.prompt_length]) for trace in traces]
    results = engine.generate(prompts, params)
    assert [r.token_ids for r in results] == [list(trace.answer) for trace in traces]
    real = [
        (round_.verified, round_.accepted, round_.committed)
        for result in results
        for round_ in result.stats.round_log
    ]
    shape = ReplayConfig(budget=BUDGET, depth=DEPTH, width=width, is_single=True)
    run = replay(drafter(), traces, shape)
    # The last round of a text has less room in the engine, which knows where it must end.
    ends = [place.trace for place in run.places]
    assert [
        (place.nodes, place.accepted, place.committed)
        for i, place in enumerate(run.places)
        if ends[i : i + 2] == [place.trace] * 2
    ] == [own for i, own in enumerate(real) if ends[i : i + 2] == [ends[i]] * 2]
    assert sum(place.committed for place in run.places) == sum(own[2] for own in real)
    figures = acceptance(run.records(traces))
    assert figures["tau"] == pytest.approx(run.tau)
    assert figures["rounds"] == len(real)


def test_strides_put_every_variant_at_the_same_places() -> None:
    shape = ReplayConfig(budget=4, depth=4, width=1, stride=3, places=4)
    traces = texts(2)
    runs = [
        replay(drafter, traces, shape) for drafter in (DSparkDrafter(fitted(8, 2)), LookupDrafter())
    ]
    places = [[(place.trace, place.context) for place in run.places] for run in runs]
    assert places[0] == places[1]
    assert len(places[0]) == 4 * len(traces)
    # No place is cut short by the end of its text.
    assert max(place.context for place in runs[0].places) + 4 <= len(traces[0].tokens)


def test_only_the_drafter_is_timed_and_its_first_call_is_left_out() -> None:
    clock = Clock()
    drafter = Wrapped(LookupDrafter(), clock, seconds=0.25)
    run = replay(drafter, texts(2), ReplayConfig(is_single=True, places=3), clock=clock)
    assert len(run.places) == 3 * 2
    assert run.seconds == pytest.approx([0.25] * (2 * 2))
    assert run.draft_seconds == pytest.approx(0.25)


def test_a_drafter_that_fails_is_reported_and_forgotten() -> None:
    clock = Clock()
    run = replay(Broken(LookupDrafter(), clock), texts(2), ReplayConfig())
    assert run.error == "IndexError: index 7 is out of bounds"
    assert run.places == []
    assert run.tau == 1.0


def test_the_drafter_forgets_the_requests_of_a_replay() -> None:
    drafter = LookupDrafter()
    replay(drafter, texts(2), ReplayConfig(places=2))
    assert drafter._states == {}


def at(*accepted: int) -> Replay:
    return Replay(
        places=[
            Place(trace=0, context=9, nodes=4, depth=4, accepted=count, committed=count + 1)
            for count in accepted
        ]
    )


def test_a_difference_is_clear_only_if_it_is_large_and_steady() -> None:
    base = [0, 1] * 20
    assert compare(at(*base), at(*[n + 1 for n in base])).is_clear
    assert not compare(at(*base), at(*base)).is_clear
    assert not compare(at(*base), at(*[1 - n for n in base])).is_clear  # no better on average
    assert not compare(at(*[n + 1 for n in base]), at(*base)).is_clear  # worse
    assert not compare(at(0, 0, 0, 0), at(0, 4, 0, 0)).is_clear  # one lucky place
    assert not compare(at(*[5] * 40), at(*[5] * 20, *[6] * 20)).is_clear  # steady, but small
    assert not compare(at(), at()).is_clear


def test_layers_move_only_where_there_are_layers() -> None:
    assert shifted_layers((0, 2), 1, 4) == {0: 1, 2: 3}
    assert shifted_layers((0, 2), -1, 4) == {0: -1, 2: 1}
    assert shifted_layers((-1, 2), -1, 4) is None
    assert shifted_layers((1, 3), 1, 4) is None
    assert shifted_layers((4,), -1, 4) is None  # all streams of a DeepSeek-V4 target
