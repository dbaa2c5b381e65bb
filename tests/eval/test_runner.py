"""Asking questions on tiny random models: what is kept, and that only what must does matter."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

import dspark
from dspark.draft.base import DraftContext
from dspark.errors import ConfigError, DataError
from dspark.eval.campaign import Campaign, Configuration, Outcome, configurations
from dspark.eval.log import RunLog
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.records import ROUND_COLUMNS, QuestionRecord, TurnRecord
from dspark.eval.results import RunFacts, read_results, write_results
from dspark.eval.runner import Runner, eval_engine, explicit_params, question_seed
from dspark.request import SamplingParams
from dspark.rounds import RoundLimits
from dspark.text import TextCodec
from dspark.tree import DraftTree, Proposal
from tests.test_engine import drafter, make_codec, model

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
QUESTIONS = (
    Question(question_id=1, category="one", turns=("abcabcabc", "again")),
    Question(question_id="two", category="two", turns=("xyxyxyxy",)),
    Question(question_id=3, category="two", turns=("the cat the cat the",)),
)
PROMPTS = PromptSet(name="tiny", questions=QUESTIONS)
GREEDY = SamplingParams(max_tokens=8)
SAMPLED = SamplingParams(max_tokens=8, temperature=1.0, tree_budget=8, depth=4, ignore_eos=True)


def codec(template: str | None = TEMPLATE) -> TextCodec:
    made = make_codec()
    made.tokenizer.chat_template = template
    return made


def engine(
    draft: str = "model", *, batch: int = 1, template: str | None = TEMPLATE
) -> dspark.Engine:
    made = dspark.Engine(model(), drafter=drafter(draft), codec=codec(template))
    return eval_engine(made, batch=batch)


@functools.cache
def ask(
    draft: str = "model", params: SamplingParams = SAMPLED, *, batch: int = 1, seed: int = 0
) -> list[QuestionRecord]:
    return Runner(engine(draft, batch=batch), params, seed=seed).run(QUESTIONS)


def untimed(records: list[QuestionRecord]) -> list[QuestionRecord]:
    """Without times, and survival rounded: draft models run without exact mode."""
    return [replace(r, turns=tuple(untimed_turn(t) for t in r.turns)) for r in records]


def untimed_turn(turn: TurnRecord) -> TurnRecord:
    rounds = (
        replace(
            item,
            survival=tuple(round(value, 4) for value in item.survival),
            nodes=tuple((up, round(value, 4), hit) for up, value, hit in item.nodes),
        )
        for item in turn.rounds
    )
    return replace(turn, seconds=0.0, first_token_seconds=0.0, rounds=tuple(rounds))


# -- the log of rounds ------------------------------------------------------------------------


DRAWN = replace(SAMPLED, rule="rejection")


@pytest.mark.parametrize(
    ("draft", "params"),
    [
        ("lookup", GREEDY),
        ("combined", SAMPLED),
        ("combined", DRAWN),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (("lookup", SAMPLED), ("lookup", DRAWN), ("combined", GREEDY))
        ),
    ],
)
def test_the_log_of_rounds_adds_up(draft: str, params: SamplingParams) -> None:
    for record in ask(draft, params):
        for turn in record.turns:
            assert turn.output_tokens == turn.committed + 1
            for item in turn.rounds:
                assert item.accepted == item.path  # no end token in these answers
                assert item.committed == item.accepted + 1
                assert item.accepted <= item.tried <= min(item.accepted + 1, item.depth)
                assert len(item.survival) <= item.depth <= item.verified
                assert item.matched <= min(item.accepted, len(item.survival))
                assert sorted(item.survival, reverse=True) == list(item.survival)


class Scripted:
    """Offers the same tree in every round."""

    name = "scripted"
    capture = ()

    def __init__(self, tree: DraftTree) -> None:
        self.tree = tree

    def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
        return [Proposal(self.tree) for _ in contexts]

    def release(self, request_id: int) -> None:
        pass


def scripted_round(tree: DraftTree, bias: dict[int, float], **more: object) -> dspark.RoundStats:
    """The first round of a target that greedily writes the biased token for ever."""
    config = dspark.EngineConfig(auto_off=False, limits=RoundLimits(keep_rounds=True))
    made = dspark.Engine(model(), drafter=Scripted(tree), config=config, codec=make_codec())
    params = SamplingParams(max_tokens=12, tree_budget=8, logit_bias=bias, **more)
    return made.generate([[5, 6]], params)[0].stats.round_log[0]


NINES = {9: 100.0}


def test_a_round_keeps_its_likeliest_chain_and_how_far_it_held() -> None:
    """The target writes 9 9 9; the likeliest chain is 9 8, the accepted path 9 9."""
    tree = DraftTree.build([9, 7, 8, 9, 6], [-1, -1, 0, 0, 2], [0.6, 0.3, 0.4, 0.1, 0.2])
    found = scripted_round(tree, NINES)
    assert found == dspark.RoundStats(
        proposed=5,
        verified=5,
        accepted=2,
        committed=3,
        depth=3,
        tried=2,
        path=2,
        survival=(0.6, 0.4, 0.2),
        matched=1,
        nodes=((-1, 0.6, True), (-1, 0.3, False), (0, 0.4, False), (0, 0.1, True), (2, 0.2, False)),
    )


def test_a_text_that_ends_in_a_path_ends_the_record_there() -> None:
    tree = DraftTree.build([9, 9, 9, 9], [-1, 0, 1, 2], [0.9, 0.8, 0.7, 0.6])
    nine = make_codec().decode([9])
    found = scripted_round(tree, NINES, stop=(nine * 3,))  # prefill writes the first of them
    assert (found.accepted, found.committed, found.path) == (2, 2, 4)
    assert (found.tried, found.survival, found.matched) == (2, (0.9, 0.8), 2)


# -- asking -----------------------------------------------------------------------------------


def test_a_later_turn_follows_the_models_own_answer() -> None:
    first, second = ask("none")[0].turns
    own = codec()
    told = [
        {"role": "user", "content": "abcabcabc"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "again"},
    ]
    assert first.prompt_tokens == len(own.encode_chat(told[:1]))
    assert second.prompt_tokens == len(own.encode_chat(told))
    params = replace(SAMPLED, seed=question_seed(0, 1, 1))
    assert engine("none").generate([told], params)[0].text == second.text


def test_raw_prompts_have_no_template() -> None:
    for records in (
        Runner(engine("none"), GREEDY, is_raw=True).run(QUESTIONS),
        Runner(engine("none", template=None), GREEDY).run(QUESTIONS),
    ):
        first, second = records[0].turns
        own = codec()
        assert first.prompt_tokens == len(own.encode("abcabcabc"))
        assert second.prompt_tokens == len(own.encode(f"abcabcabc{first.text}\n\nagain"))


def test_each_question_and_turn_has_a_seed_of_its_own() -> None:
    records = ask("lookup", seed=5)
    seeds = [turn.seed for record in records for turn in record.turns]
    assert seeds == [question_seed(5, *at) for at in ((1, 0), (1, 1), ("two", 0), (3, 0))]
    assert len(set(seeds)) == 4
    assert question_seed(5, 1) != question_seed(6, 1)
    assert question_seed(0, "1") != question_seed(0, 1)
    assert all(turn.seed is None for record in ask("none", GREEDY) for turn in record.turns)


def test_order_and_batch_change_no_record() -> None:
    """A question's record is its own: what else is asked, and when, is nothing to it."""
    alone = ask()
    assert untimed(ask(batch=3)) == untimed(alone)
    backwards = Runner(engine(), SAMPLED).run(reversed(QUESTIONS))
    assert untimed(backwards[::-1]) == untimed(alone)


def test_the_draft_changes_rounds_and_never_texts() -> None:
    texts = [[turn.text for turn in record.turns] for record in ask("none")]
    assert [[turn.text for turn in record.turns] for record in ask("combined")] == texts


def test_a_question_that_fails_does_not_stop_the_others() -> None:
    long = Question(question_id=9, category="one", turns=("a" * 5000, "more"))
    records = Runner(engine("none"), GREEDY).run([long, QUESTIONS[1]])
    assert "takes 2047" in records[0].error
    assert len(records[0].turns) == 1
    assert records[1].error is None


def test_nothing_that_depends_on_time_decides_about_a_draft() -> None:
    made = engine("lookup")
    assert made.config.auto_off is False
    assert explicit_params(GREEDY, made).tree_budget is not None
    assert explicit_params(replace(GREEDY, tree_budget=3, depth=2), made).tree_budget == 3


# -- campaigns --------------------------------------------------------------------------------

CELL = Configuration(draft="model", prompts=PROMPTS, params=SAMPLED)
FACTS = RunFacts(target="tiny-random", template="chat", seed=0, prompts=(PROMPTS,))


def campaign(log: RunLog | None = None, **options: object) -> Campaign:
    return Campaign(FACTS, log=log, **options)


def lasting(outcome: Outcome) -> dict[str, object]:
    """Figures that must not differ between two runs in any bit."""
    return {k: v for k, v in outcome.figures.items() if k not in ("resumed", "confidence")}


def test_figures_agree_with_an_independent_count_of_the_raw_log(tmp_path: Path) -> None:
    """Counted from the JSONL alone, with nothing of the package."""
    log = RunLog(tmp_path / "log.jsonl")
    found = campaign(log).run(engine("combined"), CELL).figures["acceptance"]
    log.close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    turns = [turn for row in rows for turn in row["record"]["turns"]]
    rounds = [dict(zip(ROUND_COLUMNS, r, strict=True)) for turn in turns for r in turn["rounds"]]
    assert len(turns) == 4
    committed = sum(item["committed"] for item in rounds)
    assert committed == sum(turn["output_tokens"] - 1 for turn in turns)
    assert found["tau"] == committed / len(rounds)
    assert found["rounds"] == len(rounds)
    for name in ("proposed", "verified", "accepted", "committed"):
        assert found[name] == sum(item[name] for item in rounds)
    own = [sum(r[3] for r in turn["rounds"]) / len(turn["rounds"]) for turn in turns]
    assert found["tau_means"]["per_request"] == pytest.approx(sum(own) / len(own))
    for rate in found["per_position"]:
        hits = [item for item in rounds if item["accepted"] >= rate["position"]]
        assert rate["unconditional"] == len(hits) / len(rounds)


def test_figures_agree_with_the_engines_own_statistics() -> None:
    made = engine("combined")
    found = campaign().run(made, CELL).figures
    stats = []
    for question in QUESTIONS[1:]:
        params = replace(SAMPLED, seed=question_seed(0, question.question_id))
        prompt = [{"role": "user", "content": question.turns[0]}]
        stats.append(made.generate([prompt], params)[0].stats)
    group = found["by_category"]["two"]
    assert group["tau"] == sum(s.committed for s in stats) / sum(s.rounds for s in stats)
    for k, rate in enumerate(group["per_position"]):
        assert rate["accepted"] == sum(sum(s.accepted_at_depth[k : k + 1]) for s in stats)
        assert rate["offered"] == sum(sum(s.verified_at_depth[k : k + 1]) for s in stats)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = campaign().run(engine(), CELL)
    path = tmp_path / "log.jsonl"

    def interrupt(done: float) -> None:
        if done > 2.2:  # the first question has two turns
            raise KeyboardInterrupt

    log = RunLog(path)
    made = engine()
    with pytest.raises(KeyboardInterrupt):
        campaign(log).run(made, CELL, on_progress=interrupt)
    log.close()
    assert log.count == 1
    with path.open("ab") as file:
        file.write(b'{"key": "torn')  # what a killed process leaves

    log = RunLog(path)
    progress: list[float] = []
    resumed = campaign(log).run(engine(), CELL, on_progress=progress.append)
    log.close()
    assert resumed.figures["resumed"] == 1
    assert lasting(resumed) == lasting(whole)
    assert untimed(list(resumed.records)) == untimed(list(whole.records))
    assert progress[0] == 2
    assert progress[-1] == 4
    assert progress == sorted(progress)

    log = RunLog(path)
    assert campaign(log).run(engine(), CELL).figures["resumed"] == 3
    other = replace(CELL, params=replace(SAMPLED, temperature=0.7))
    assert campaign(log).run(engine(), other).figures["resumed"] == 0
    log.close()
    log = RunLog(path, is_fresh=True)
    assert log.count == 0
    log.close()


def test_a_malformed_log_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"key": "k", "question": "q", "record": {}}\n')
    with pytest.raises(DataError, match=r"log\.jsonl, line 1"):
        RunLog(path)
    with pytest.raises(DataError, match="cannot be used"):
        RunLog(tmp_path)


def test_drafts_prompt_sets_and_kinds_of_sampling_are_crossed() -> None:
    other = replace(PROMPTS, name="other")
    cells = configurations(["none", "lookup"], [PROMPTS, other], [GREEDY, SAMPLED])
    assert len(cells) == 8
    assert len({cell.model_id for cell in cells}) == 8
    assert cells[0].name == "none T=0 tiny"
    assert cells[0].model_id == "none-temp-0-tiny"
    (cell,) = configurations(["lookup"], [PROMPTS], [SAMPLED], ["deepspec"])
    assert cell.params.rule == "rejection"
    with pytest.raises(ConfigError, match="asked for twice"):
        configurations(["lookup", "lookup"], [PROMPTS], [GREEDY])


def test_a_result_file_says_what_was_run(tmp_path: Path) -> None:
    first = Campaign(replace(FACTS, warm_ups=1), definitions=("deepspec", "specbench"))
    outcomes = [first.run(engine(), CELL), first.run(engine("none"), replace(CELL, draft="none"))]
    path = tmp_path / "results.json"
    write_results(path, first.results(outcomes))
    found = read_results(path, "dspark.eval", 1)
    header = found["header"]
    assert [draft["id"] for draft in header["drafts"]] == ["model", "none"]
    assert header["target"]["dtype"] == "float32"
    assert header["sampling"][0]["temperature"] == 1.0
    assert header["sampling"][0]["rule"] == "coupled"  # resolved
    assert header["sampling"][0]["tree_budget"] == 8
    assert header["prompts"][0]["sha256"] == PROMPTS.sha256
    assert header["prompts"][0]["count"] == 3
    assert header["exact"]["enabled"] is True
    assert header["warm_ups"] == 1
    assert found["configurations"][0]["acceptance"]["requests"] == 4  # they count nowhere
    assert {"torch", "transformers"} <= set(header["libraries"])
    for key in ("created", "command", "commit", "dirty", "device", "threads", "seed", "repeats"):
        assert key in header
    for cell in found["configurations"]:
        assert set(cell["definitions"]) == {"deepspec", "specbench"}
        assert cell["acceptance"]["tau_means"]["per_round"] == cell["acceptance"]["tau"]
    quality = found["configurations"][0]["confidence"]
    assert (quality["rule"], quality["temperature"], quality["bins"]) == ("coupled", 1.0, 20)
    assert found["configurations"][1]["confidence"] is None
    with pytest.raises(DataError, match="but must have 'dspark_audit'"):
        read_results(path, "dspark_audit", 1)
    path.write_text(json.dumps({**found, "version": 2}))
    with pytest.raises(DataError, match="is version 2"):
        read_results(path, "dspark.eval", 1)
