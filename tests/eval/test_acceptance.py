"""Acceptance figures against counts by hand, and under other projects' definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark.errors import ConfigError
from dspark.eval.acceptance import acceptance, bootstrap_tau, by_category, by_context
from dspark.eval.definitions import (
    DEFINITIONS,
    apply_definition,
    check_definition,
    deepspec,
    specbench,
    vllm,
)
from dspark.eval.records import QuestionRecord, TurnRecord
from dspark.eval.specbench import write_answers
from dspark.request import SamplingParams
from tests.eval.log_of import chain_round, record_of, turn_of

# Three rounds with a chain of 4: two accepted, none accepted, all four accepted.
THREE = turn_of(chain_round(2, 4), chain_round(0, 4), chain_round(4, 4))


def test_the_three_means_by_hand() -> None:
    """L = 3, 1, 5 in one request and 2 in another."""
    other = turn_of(chain_round(1, 2))
    found = acceptance([record_of(THREE), record_of(other, question_id=2)])
    assert found["tau"] == found["tau_means"]["per_round"] == 11 / 4
    assert found["tau_means"]["per_request"] == (3 + 2) / 2
    assert found["tau_means"]["per_token"] == (9 + 1 + 25 + 4) / 11
    means = found["accept_len_means"]
    assert means["per_round"] == 7 / 4
    assert means["per_request"] == (6 / 3 + 1) / 2
    assert means["per_token"] == (2 * 3 + 0 * 1 + 4 * 5 + 1 * 2) / 11
    assert found["accept_len_histogram"] == [1, 1, 1, 0, 1]
    assert found["acceptance_rate"] == 7 / 14
    assert found["verify_rate"] == 11 / (14 + 4)
    assert found["wasted_per_token"] == 7 / 11
    assert found["full_acceptance"] == 1 / 4


def test_positions_by_hand() -> None:
    rows = acceptance([record_of(THREE)])["per_position"]
    assert [row["accepted"] for row in rows] == [2, 2, 1, 1]
    assert [row["reached"] for row in rows] == [3, 2, 2, 1]
    assert [row["offered"] for row in rows] == [3, 3, 3, 3]
    assert [row["unconditional"] for row in rows] == [2 / 3, 2 / 3, 1 / 3, 1 / 3]
    assert [row["conditional"] for row in rows] == [2 / 3, 1, 1 / 2, 1]


def test_a_tree_that_ends_early_on_one_branch_is_not_reached_there() -> None:
    """The tree is 3 deep, but the accepted branch had no child at depth 2."""
    item = replace(chain_round(1, 3), tried=1, verified=5)
    rows = acceptance([record_of(turn_of(item))])["per_position"]
    assert [row["reached"] for row in rows] == [1, 0, 0]
    assert rows[1]["conditional"] is None
    assert rows[1]["of_offered"] == 0


def test_plain_rounds_count_in_tau_and_nowhere_else() -> None:
    found = acceptance([record_of(turn_of(chain_round(0, 0), chain_round(0, 0)))])
    assert (found["tau"], found["rounds_drafted"], found["per_position"]) == (1.0, 0, [])
    assert found["acceptance_rate"] is None
    assert found["full_acceptance"] is None


def test_an_empty_log_has_no_figures_and_no_error() -> None:
    failed = replace(turn_of(), error="the prompt is too long.")
    for records in ([], [record_of(turn_of())], [record_of(failed)]):
        found = acceptance(records)
        assert found["tau"] is None
        assert found["tau_ci95"] is None
        assert json.dumps({**found, **{n: d(records) for n, d in DEFINITIONS.items()}})


def test_spec_bench_by_hand_on_three_rounds() -> None:
    """Its EAGLE loops append accept_length + 1 per step; speed.py takes the plain mean."""
    assert specbench([record_of(THREE)]) == {"mean_accepted_tokens": (3 + 1 + 5) / 3, "steps": 3}
    # The last path of 4 had its end token in second place: Spec-Bench counts it whole.
    ended = turn_of(chain_round(2, 4), chain_round(0, 4), chain_round(2, 4, path=4))
    assert specbench([record_of(ended)])["mean_accepted_tokens"] == (3 + 1 + 5) / 3
    assert acceptance([record_of(ended)])["tau"] == (3 + 1 + 2) / 3


def test_deepspec_by_hand_on_three_rounds() -> None:
    """verify_draft_tokens trims the last proposal to the end token and gives no bonus there."""
    ended = turn_of(chain_round(2, 4), chain_round(0, 4), chain_round(2, 4, path=4))
    found = deepspec([record_of(ended)])
    assert found["proposal_count"] == 3
    assert found["acceptance_length"] == (3 + 1 + 2) / 3
    assert found["draft_tokens_per_proposal"] == (4 + 4 + 2) / 3
    assert found["verify_rate"] == (3 + 1 + 2) / (4 + 4 + 2 + 3)
    assert found["accept_rates_by_position"] == [2 / 3, 2 / 3, 0 / 2, 0 / 2]


def test_vllm_by_hand_on_four_rounds() -> None:
    ended = turn_of(chain_round(2, 4), chain_round(0, 0), chain_round(2, 4, path=4))
    found = vllm([record_of(ended)])
    assert found["spec_decode_num_drafts"] == 2
    assert found["spec_decode_acceptance_length"] == 1 + 6 / 2
    assert found["spec_decode_acceptance_rate"] == 6 / 8
    assert found["spec_decode_per_position_acceptance_rates"] == [1.0, 1.0, 0.5, 0.5]


def test_deepspec_figures_run_under_the_rejection_rule() -> None:
    sampled = SamplingParams(temperature=1.0)
    assert check_definition("deepspec", sampled).rule == "rejection"
    assert check_definition("deepspec", SamplingParams()).resolved_rule == "greedy"
    assert check_definition("specbench", sampled) == sampled
    with pytest.raises(ConfigError, match="rejection rule"):
        check_definition("deepspec", replace(sampled, rule="coupled"))
    with pytest.raises(ConfigError, match="must be one of deepspec, specbench, vllm"):
        check_definition("speedbench", sampled)


def test_notes_say_where_a_run_differs_from_its_source() -> None:
    tree = replace(chain_round(1, 2), verified=5)
    records = [record_of(turn_of(tree), turn_of(tree))]
    params = SamplingParams(temperature=1.0, rule="rejection")
    assert len(apply_definition("deepspec", records, params)["notes"]) == 2
    assert apply_definition("deepspec", [record_of(THREE)], params)["notes"] == []
    assert apply_definition("specbench", [record_of(THREE)], params)["notes"]


def test_categories_are_counted_apart_and_sum_up() -> None:
    records = [
        record_of(THREE, category="b"),
        record_of(turn_of(chain_round(1, 2)), question_id=2),
        record_of(THREE, question_id=3),
    ]
    groups = by_category(records)
    assert list(groups) == ["b", "a"]
    for key in ("rounds", "accepted", "committed", "prompts"):
        assert sum(group[key] for group in groups.values()) == acceptance(records)[key]


def test_context_buckets_by_hand() -> None:
    """A prompt of 10 tokens: rounds start from 11, 14 and 15 tokens of context."""
    rows = by_context([record_of(THREE)], (12, 15))
    assert [(row["from"], row["to"], row["rounds"]) for row in rows] == [
        (0, 12, 1),
        (12, 15, 1),
        (15, None, 1),
    ]
    assert [row["tau"] for row in rows] == [3, 1, 5]
    assert [row["accept_len"] for row in rows] == [2, 0, 4]
    for edges in ((0,), (5, 5), (9, 3)):
        with pytest.raises(ConfigError, match="rising"):
            by_context([], edges)


def test_the_interval_covers_tau_as_often_as_it_says() -> None:
    """100 worlds of 30 prompts, easy or hard by a coin: an interval that misses tau one time in
    twenty misses 20 or more with odds below 1e-6; one over rounds would miss most."""
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(100):
        records = []
        for question in range(30):
            rate = random.choice([0.2, 0.8])  # a prompt is easy or hard
            rounds = [chain_round(int(random.random() < rate), 1) for _ in range(10)]
            records.append(record_of(turn_of(*rounds), question_id=question))
        interval = bootstrap_tau(records, resamples=100)
        assert interval is not None
        missed += not interval[0] <= 1.5 <= interval[1]
    assert missed < 20
    assert bootstrap_tau(records[:1]) is None
    assert bootstrap_tau(records) == bootstrap_tau(records)


def read_as_speed_does(path: Path) -> tuple[float, float]:
    """What Spec-Bench's speed.py takes from a file: mean accepted tokens, mean of row speeds."""
    lengths: list[int] = []
    speeds = []
    for line in path.read_text(encoding="utf-8").splitlines():
        choice = json.loads(line)["choices"][0]
        speeds.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
        lengths.extend(choice["accept_lengths"])
    return float(np.mean(lengths)), float(np.mean(speeds))


def test_an_answer_file_gives_spec_benchs_figures(tmp_path: Path) -> None:
    second = turn_of(chain_round(1, 2), seconds=0.5, text="  two\n")
    failed = replace(turn_of(), error="no")
    records: list[QuestionRecord] = [
        record_of(THREE, second, question_id=90),
        record_of(failed, question_id=5),
        record_of(turn_of(chain_round(0, 2), seconds=0.0), question_id=7),
    ]
    path = write_answers(tmp_path / "new", "model-x", records)
    assert path.name == "model-x.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [7, 90]
    assert rows[1]["choices"][0]["turns"] == ["t", "two"]
    assert rows[1]["choices"][0]["decoding_steps"] == [3, 1]
    lengths, _ = read_as_speed_does(path)
    assert lengths == specbench([records[0], records[2]])["mean_accepted_tokens"]


def test_records_survive_json() -> None:
    turn = turn_of(chain_round(1, 3, survival=(0.75, 0.5, 0.125)), chain_round(2, 4, path=4))
    record = record_of(turn, question_id="é")
    assert QuestionRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert list(TurnRecord.from_json(turn.to_json()).contexts) == [11, 13]
