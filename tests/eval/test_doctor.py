"""The doctor names each fault that is planted, and finds nothing in a healthy pair."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark
from dspark.draft.base import DraftContext, Drafter
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.eagle3_format import save_eagle3
from dspark.draft.formats.deepspec import save_draft
from dspark.draft.lookup import LookupDrafter
from dspark.errors import ConfigError
from dspark.eval.doctor import machine_checks, run
from dspark.eval.doctor.draft_checks import (
    check_dtype,
    check_loading,
    check_proposals,
    check_vocabulary,
    check_weights,
    check_window,
)
from dspark.eval.doctor.exam import DoctorConfig, Exam
from dspark.eval.doctor.findings import CheckResult, DoctorReport, Finding, Severity
from dspark.eval.doctor.machine_checks import check_exact, check_memory, check_threads
from dspark.eval.doctor.patient import Patient, load_patient
from dspark.eval.doctor.references import find_reference, load_references
from dspark.eval.doctor.replay import replay
from dspark.eval.doctor.run import diagnose
from dspark.eval.doctor.speed_check import check_speed, measured_run
from dspark.eval.doctor.text_checks import Asked, ask, check_acceptance, check_template
from dspark.eval.doctor.traces import Trace, add_states, write_traces
from dspark.eval.doctor.variant_checks import check_block, check_layers, check_mask
from dspark.mtp_head import DraftVocab
from dspark.tree import Proposal
from dspark.tree_build import chain
from tests.conftest import VOCAB
from tests.draft.dspark_models import make_module
from tests.draft.test_eagle3 import make_module as make_eagle3
from tests.eval.doctor_pairs import (
    BLOCK,
    LAYERS,
    MASK,
    MAX_TOKENS,
    Broken,
    Clock,
    Silent,
    Wrapped,
    asked,
    changed,
    fitted,
    pair,
    target,
    texts,
)
from tests.eval.test_runner import codec

pytestmark = pytest.mark.slow  # trains the drafts that it breaks

CONFIG = DoctorConfig(max_tokens=MAX_TOKENS, has_run=False, step_seconds=0.2, max_variants=8)
PLAIN = [Asked(question_id=i, category="toy", text=text) for i, text in enumerate(("abab", "the"))]


@functools.cache
def states() -> list[Trace]:
    """Texts with the states of every layer."""
    return add_states(target(), texts(), (-1, 0, 1, 2, 3))


def examine(
    patient: Patient, clock: Clock | None = None, needs: str = "strides", **settings: object
) -> Exam:
    """An exam up to where the checks begin, as far as they need it."""
    config = dataclasses.replace(CONFIG, **settings)
    traces = states()[:2] if needs == "tree" else states()
    exam = Exam(patient=patient, config=config, traces=traces, clock=clock or Clock())
    drafter = patient.drafter if needs == "tree" else patient.trained
    shape = {"tree": config.tree, "chain": config.chain, "strides": config.strides}[needs]
    setattr(exam, needs, replay(drafter, traces, shape, clock=exam.clock))
    return exam


@functools.cache
def healthy(needs: str = "strides") -> Exam:
    return examine(*pair(), needs=needs)


def only(check: CheckResult, severity: Severity) -> Finding:
    """The one finding of a check, which must be of this severity."""
    (found,) = check.findings
    assert found.severity is severity
    assert found.evidence
    assert found.advice
    return found


# -- a healthy pair ---------------------------------------------------------------------------


def test_a_healthy_pair_gives_no_problem() -> None:
    patient, clock = pair()
    told: list[str] = []
    report = diagnose(
        patient,
        asked()[:3],
        dataclasses.replace(CONFIG, is_quick=True),
        header={"created": "today"},
        on_progress=lambda what, done, left: told.append(what),
        clock=clock,
    )
    found = [finding.what for s in Severity for name, finding in report.found(s)]
    assert found == []
    assert (report.status, report.exit_code) == ("fine", 0)
    by_name = {check.name: check for check in report.checks}
    for name in ("layer ids", "mask token", "block size", "weights", "proposals", "speed"):
        assert by_name[name].status == "fine"
        assert by_name[name].seen
    assert report.acceptance["chain"]["tau"] > 3
    assert report.cost is not None
    assert report.cost["predicted"] > 2
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (data["schema"], data["version"], data["status"]) == ("dspark.doctor", 1, "fine")
    assert data["header"] == {"created": "today"}
    assert "answers" in told
    assert "layer ids" in told


def test_ctrl_c_keeps_the_checks_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> CheckResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_layers", interrupted)
    patient, clock = pair()
    config = dataclasses.replace(CONFIG, is_quick=True, max_tokens=8)
    report = diagnose(patient, asked()[:1], config, clock=clock)
    assert report.is_interrupted
    assert report.exit_code == 130
    assert [check.name for check in report.checks][-1] == "vocabulary"
    assert "a part" in report.verdict()


def test_a_visit_without_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        diagnose(*pair()[:1], asked=[])


# -- planted in the draft's settings ----------------------------------------------------------


@pytest.mark.parametrize(("layers", "shift"), [((1, 2), -1), ((-1, 0), 1)])
def test_layer_ids_that_are_off_by_one_are_named(layers: tuple[int, ...], shift: int) -> None:
    exam = examine(*pair(changed(fitted(), target_layer_ids=layers)))
    check = check_layers(exam)
    found = only(check, Severity.PROBLEM)
    assert found.what.endswith(f"{list(layers)} should be {list(LAYERS)}")
    assert check.figures[f"tokens_at_{shift:+d}"] > 2 * check.figures["tokens"]


def test_right_layer_ids_are_not_blamed() -> None:
    check = check_layers(healthy())
    assert check.status == "fine"
    assert check.figures["tokens"] > 2 * check.figures["tokens_at_+1"]


def test_a_wrong_mask_token_is_found_and_the_right_one_named() -> None:
    exam = examine(*pair(changed(fitted(), mask_token_id=90)))
    found = check_mask(exam).findings[0]
    assert found.severity is Severity.PROBLEM
    assert found.what == f"the mask token should probably be {MASK}, not 90"
    assert check_mask(healthy()).status == "fine"


def test_a_mask_token_of_ordinary_texts_is_a_warning() -> None:
    common = states()[0].answer[0]
    exam = examine(*pair(changed(fitted(), mask_token_id=common)), max_variants=0)
    said = [finding for finding in check_mask(exam).findings if "ordinary" in finding.what]
    assert [finding.severity for finding in said] == [Severity.WARNING]


def test_a_mask_token_without_an_embedding_is_a_warning() -> None:
    module = copy.deepcopy(fitted())
    module.embed_tokens.weight.data[MASK] = 0
    said = [f.what for f in check_mask(examine(*pair(module), max_variants=0)).findings]
    assert any("never trained" in what for what in said)


def test_a_block_that_is_too_long_is_named() -> None:
    exam = examine(*pair(changed(fitted(), block_size=16)))
    found = check_block(exam).findings[0]
    assert found.severity is Severity.PROBLEM
    assert f"block_size {BLOCK} does better than 16" in found.what


def test_a_block_that_begins_at_the_wrong_slot_is_named() -> None:
    exam = examine(*pair(changed(fitted(), sample_from_anchor=False)))
    found = check_block(exam).findings[0]
    assert found.severity is Severity.PROBLEM
    assert "sample_from_anchor true does better than false" in found.what


def test_the_depth_that_leaves_a_block_unused_and_the_name_that_contradicts_it(
    tmp_path: Path,
) -> None:
    patient, clock = pair(folder=tmp_path / "dspark_toy_block7")
    check = check_block(examine(patient, clock, depth=2, is_quick=True))
    named, unused = check.findings
    assert (named.severity, unused.severity) == (Severity.WARNING, Severity.NOTE)
    assert "named dspark_toy_block7, but its block_size is 4" in named.what
    assert "depth 2 leaves 2 of the block's 4 positions unused" in unused.what


def cut(size: int) -> DSparkModule:
    """The fitted module with the first `size` tokens for a vocabulary."""
    module = copy.deepcopy(fitted())
    module.vocab = DraftVocab.build(VOCAB, range(size))
    module.config = dataclasses.replace(module.config, draft_vocab_size=size)
    module.lm_head.weight = torch.nn.Parameter(
        module.lm_head.weight[:size].clone(), requires_grad=False
    )
    return module


def test_a_truncated_vocabulary_is_named_with_its_coverage() -> None:
    check = check_vocabulary(examine(*pair(cut(VOCAB // 2))))
    found = only(check, Severity.PROBLEM)
    said = [token for trace in states() for token in trace.answer]
    missing = sum(token >= VOCAB // 2 for token in said) / len(said)
    assert missing > 0.1
    assert check.figures["coverage"] == pytest.approx(1 - missing)
    assert f"{100 * missing:.0f} % of {len(said)} tokens" in found.evidence
    whole = check_vocabulary(examine(*pair(cut(VOCAB))))
    assert whole.status == "fine"
    assert check_vocabulary(healthy()).status == "fine"


def test_a_vocabulary_map_that_does_not_rise_is_named() -> None:
    module = copy.copy(fitted())
    module.vocab = DraftVocab(VOCAB, torch.arange(VOCAB).flip(0))
    found = only(check_vocabulary(examine(*pair(module))), Severity.WARNING)
    assert "does not rise" in found.what


def test_weights_that_are_not_finite_are_named_and_keep_the_draft_silent() -> None:
    module = copy.deepcopy(fitted())
    module.norm.weight.data[3] = float("nan")
    patient, clock = pair(module)
    found = only(check_weights(patient), Severity.PROBLEM)
    assert "NaN or infinity in 1 of" in found.evidence
    assert "norm.weight" in found.evidence
    silent = only(check_proposals(examine(patient, clock, "tree")), Severity.PROBLEM)
    assert silent.what == "the draft never proposes"
    assert "not finite" in silent.evidence
    assert check_weights(pair()[0]).status == "fine"


# -- planted in the drafter -------------------------------------------------------------------


def test_a_draft_that_never_proposes_is_a_problem() -> None:
    clock = Clock()
    patient, _ = pair(drafter=(silent := Silent(LookupDrafter(), clock)), trained=silent)
    found = only(check_proposals(examine(patient, clock, "tree")), Severity.PROBLEM)
    assert found.what == "the draft never proposes"
    assert "0 % of" in found.evidence


def test_lookup_that_finds_nothing_is_a_warning() -> None:
    patient, clock = pair(drafter=LookupDrafter(), trained=None, module=None)
    exam = examine(patient, clock, "tree")
    exam.traces = [dataclasses.replace(trace, tokens=tuple(range(40))) for trace in exam.traces]
    exam.tree = replay(LookupDrafter(), exam.traces, exam.config.tree)
    found = only(check_proposals(exam), Severity.WARNING)
    assert "never proposes on these prompts" in found.what


def test_a_drafter_that_fails_is_a_problem() -> None:
    clock = Clock()
    patient, _ = pair(drafter=Broken(LookupDrafter(), clock))
    found = only(check_proposals(examine(patient, clock, "tree")), Severity.PROBLEM)
    assert "IndexError: index 7 is out of bounds" in found.evidence


def test_a_draft_that_is_too_slow_does_not_pay() -> None:
    """Three plain steps a round, for a little more than three tokens."""
    clock = Clock()
    slow = Wrapped(DSparkDrafter(fitted()), clock, seconds=0.060)
    patient, _ = pair(drafter=slow, trained=slow)
    patient = dataclasses.replace(patient, target=pair()[0].target)
    patient.target.clock = clock
    result = check_speed(examine(patient, clock, "tree", is_quick=True))
    assert result.check.status == "problem"
    first, second = result.check.findings[:2]
    assert "drafting does not pay here: 0." in first.what
    assert "breaks even at" in first.evidence
    assert "too slow" in first.advice
    assert "longer than the target's own step" in second.what


def test_the_price_of_a_budget_is_that_of_its_parts() -> None:
    patient, clock = pair()
    result = check_speed(examine(patient, clock, "tree", is_quick=True, tree_budget=31))
    assert result.table is not None
    for own in result.table["budgets"]:
        step = 0.010 + 0.0001 * own["mean_rows"]
        assert own["draft_seconds"] == pytest.approx(0.001)
        assert own["round_seconds"] == pytest.approx(0.001 + step, rel=1e-3)
        assert own["speedup"] == pytest.approx(own["tau"] * 0.0101 / (0.001 + step), rel=1e-3)
    speeds = {own["budget"]: own["speedup"] for own in result.table["budgets"]}
    assert result.table["best_budget"] == max(speeds, key=speeds.get)
    users = [own["speedup"] for own in result.table["by_users"]]
    assert users == sorted(users, reverse=True)


def test_a_measured_run_compares_with_plain_decoding() -> None:
    patient = Patient(target=target(), drafter=DSparkDrafter(fitted()))
    found = measured_run(examine(patient, needs="tree", is_quick=True, max_tokens=16), 7)
    assert found is not None
    assert found.tau > 2
    assert found.speedup == found.drafted / found.plain > 0


# -- planted in the files ---------------------------------------------------------------------


def saved(folder: Path, **fields: object) -> Path:
    """The fitted draft in DeepSpec's layout, its config.json changed."""
    save_draft(folder, fitted())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def loaded(folder: Path | str) -> Patient:
    engine = dspark.Engine(target())
    return load_patient(engine, "smollm2-135m", str(folder), dtype="float32", device="cpu")


def test_a_saved_draft_is_loaded_with_its_module(tmp_path: Path) -> None:
    patient = loaded(saved(tmp_path / "draft"))
    assert patient.refusal is None
    assert patient.module is not None
    assert patient.gamma == BLOCK
    assert check_loading(patient).status == "fine"
    run = replay(patient.drafter, states(), CONFIG.chain)
    assert run.tau == pytest.approx(healthy("chain").chain.tau)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": 500}, "mask_token_id is 500"),
        ({"target_layer_ids": [1, 3]}, "drafts are not trained on the last"),
        ({"vocab_size": 95, "draft_vocab_size": 95}, "vocab_size is 95"),
        ({"num_target_layers": 5}, "num_target_layers is 5"),
        ({"draft_vocab_size": 48}, "no tensor d2t"),
    ],
)
def test_a_draft_that_is_refused_is_a_problem(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    patient = loaded(saved(tmp_path / "draft", **fields))
    found = only(check_loading(patient), Severity.PROBLEM)
    assert message in found.evidence
    report = diagnose(patient, asked()[:1], CONFIG, clock=Clock())
    assert report.exit_code == 3
    assert "speed" not in {check.name for check in report.checks}


def test_a_combination_is_looked_at_by_its_trained_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "draft")
    from dspark.eval.doctor import patient as module

    lookup = dspark.Engine(target(), drafter=LookupDrafter())
    monkeypatch.setattr(module, "load_drafts", lambda *_, **__: lookup)
    patient = loaded(f"{folder}+lookup")
    assert patient.drafter.name == "lookup+dflash"
    assert patient.trained.name == "dflash"
    assert patient.module is not None


def saved_eagle3(folder: Path) -> Path:
    """A random EAGLE-3 draft for the toy target, with half of its vocabulary."""
    options = {
        "hidden_size": 64,
        "target_hidden_size": 64,
        "target_layers": (0, 1, 2),
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB // 2,
        "has_embedding": False,
        "max_positions": 2048,
    }
    save_eagle3(folder, make_eagle3(**options), layout="eagle3")
    return folder


def test_an_eagle3_draft_is_looked_at_by_its_files(tmp_path: Path) -> None:
    folder = saved_eagle3(tmp_path)
    patient = loaded(folder)
    assert patient.trained is not None
    assert patient.module is None
    exam = examine(patient)
    check = check_vocabulary(exam)
    assert check.figures["draft_vocab_size"] == VOCAB // 2
    assert 0.2 < check.figures["coverage"] < 0.8
    assert only(check, Severity.PROBLEM)
    assert set(check_layers(exam).figures) >= {"tokens_at_-1", "tokens_at_+1"}
    assert check_mask(exam).is_skipped
    assert check_block(exam).is_skipped
    assert check_weights(patient).status == "fine"
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    assert "norm.weight" in only(check_weights(patient), Severity.PROBLEM).evidence


def test_without_a_draft_the_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark.eval.doctor import patient as module

    monkeypatch.setattr(module, "load_drafts", lambda *_, **__: dspark.Engine(target()))
    patient = loaded("none")
    assert patient.drafter is None
    report = diagnose(patient, asked()[:1], CONFIG, clock=Clock())
    assert [check.name for check in report.checks] == ["loading", "exact mode", "threads", "memory"]
    assert report.checks[0].is_skipped


# -- references -------------------------------------------------------------------------------


def test_every_reference_is_whole_and_names_its_source() -> None:
    known = load_references()
    assert len({own.name for own in known}) == len(known) >= 8
    for own in known:
        assert own.source
        assert own.conditions
        assert all(1 < tau < 8 for tau in own.tau.values())


def named(spec: str, **config: object) -> Patient:
    drafter = LookupDrafter()
    return Patient(target=target(), drafter=drafter, trained=drafter, spec=spec, config=config)


def test_references_are_found_by_name_and_by_config() -> None:
    assert find_reference(named("deepseek-ai/dspark_qwen3_4b_block7")).lowest == 3.29
    identity = {
        "architectures": ["Qwen3DSparkModel"],
        "hidden_size": 2560,
        "num_target_layers": 36,
        "block_size": 7,
    }
    assert find_reference(named("mine", **identity, markov_rank=256)).tau["GSM8K"] == 6.11
    assert find_reference(named("mine", **identity, markov_rank=0)).tau["GSM8K"] == 5.40
    assert find_reference(named("mine", **{**identity, "hidden_size": 64})) is None
    lookup = Patient(target=target(), drafter=LookupDrafter(), spec="lookup")
    assert find_reference(lookup) is None


def with_card(tau: float, **training: object) -> dict[str, object]:
    return {"dspark_draft": {"training": {"validation": {"tau_greedy": tau}, **training}}}


def test_acceptance_far_under_the_model_card_is_a_problem() -> None:
    broken = changed(fitted(), mask_token_id=90)
    exam = examine(*pair(broken, config=with_card(4.4)), needs="chain")
    found = only(check_acceptance(exam), Severity.PROBLEM)
    assert "far below" in found.what
    assert "4.40" in found.evidence
    fine = examine(*pair(config=with_card(4.4)), needs="chain")
    assert check_acceptance(fine).status == "fine"
    assert check_acceptance(healthy("chain")).status == "fine"


def test_a_draft_that_guesses_is_a_problem_without_any_reference() -> None:
    exam = examine(*pair(make_module(target_layer_ids=LAYERS)), needs="chain")
    assert only(check_acceptance(exam), Severity.PROBLEM).what == "the draft is hardly ever right"


# -- text and template ------------------------------------------------------------------------


class Memory:
    """A drafter that knows some texts by heart, and nothing else."""

    name = "memory"
    capture: tuple[int, ...] = ()

    def __init__(self, known: Sequence[Sequence[int]], layers: tuple[int, ...] = ()) -> None:
        self.known = [tuple(text) for text in known]
        self.capture = layers
        self.exact_states = False

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> Proposal:
        here = tuple(context.tokens)
        found = next((text for text in self.known if text[: len(here)] == here), ())
        states = list((context.features or {}).values())
        if states and not torch.equal(states[0], states[0].bfloat16().float()):
            found = ()
        following = found[len(here) : len(here) + context.depth]
        return Proposal(chain(following or (VOCAB - 1,)))

    def release(self, request_id: int) -> None:
        pass


def text_exam(drafter: Drafter, *, is_raw: bool = False, **config: object) -> Exam:
    settings = dataclasses.replace(CONFIG, is_raw=is_raw, max_tokens=16)
    patient = Patient(
        target=target(), drafter=drafter, trained=drafter, codec=codec(), config=config
    )
    prompts = ask(PLAIN, codec(), is_raw=is_raw)
    traces = write_traces(target(), codec(), prompts, max_tokens=16)
    exam = Exam(patient=patient, config=settings, traces=traces)
    exam.chain = replay(drafter, traces, settings.chain)
    return exam


def known_texts(*, is_raw: bool) -> list[tuple[int, ...]]:
    prompts = ask(PLAIN, codec(), is_raw=is_raw)
    return [trace.tokens for trace in write_traces(target(), codec(), prompts, max_tokens=16)]


@pytest.mark.parametrize("is_raw", [False, True])
def test_a_draft_of_another_template_is_named(is_raw: bool) -> None:
    """It knows the texts of the other form by heart."""
    drafter = Memory(known_texts(is_raw=not is_raw))
    check = check_template(text_exam(drafter, is_raw=is_raw), PLAIN)
    found = only(check, Severity.WARNING)
    label = "with the chat template" if is_raw else "without the chat template"
    assert found.what == f"the draft does better {label}"
    fine = check_template(text_exam(Memory(known_texts(is_raw=is_raw)), is_raw=is_raw), PLAIN)
    assert fine.status == "fine"


def test_a_recorded_template_that_is_another_one_is_named() -> None:
    drafter = Memory(known_texts(is_raw=False))
    ours = hashlib.sha256(codec().tokenizer.chat_template.encode()).hexdigest()
    for theirs, count in ((ours, 0), ("0" * 64, 1)):
        card = with_card(1.0, template_sha256=theirs)
        check = check_template(text_exam(drafter, **card), PLAIN)
        assert len(check.findings) == count
    assert "another chat template" in check.findings[0].what


# -- dtype and window -------------------------------------------------------------------------


def test_a_draft_that_expects_bfloat16_states_is_named() -> None:
    drafter = Memory([trace.tokens for trace in states()], layers=(1,))
    patient = Patient(
        target=target(), drafter=drafter, trained=drafter, config={"dtype": "bfloat16"}
    )
    found = only(check_dtype(examine(patient)), Severity.WARNING)
    assert "expects hidden states of bfloat16" in found.what


def test_both_dtypes_of_a_healthy_module_are_compared() -> None:
    check = check_dtype(healthy())
    assert check.status == "fine"
    assert check.figures["tokens_in_bfloat16"] > 2


def test_contexts_longer_than_the_draft_was_made_for_are_a_problem() -> None:
    backbone = dataclasses.replace(fitted().config.backbone, max_positions=20)
    exam = examine(*pair(changed(fitted(), backbone=backbone)), needs="chain")
    found = only(check_window(exam), Severity.PROBLEM)
    assert "max_position_embeddings 20" in found.evidence
    backbone = dataclasses.replace(backbone, max_positions=1000)
    exam = examine(*pair(changed(fitted(), backbone=backbone)), needs="chain")
    assert only(check_window(exam), Severity.NOTE).what.endswith("up to 1000 tokens")


def test_acceptance_that_falls_with_the_context_is_named() -> None:
    """It knows the first half of every text only."""
    drafter = Memory([trace.tokens[:28] for trace in states()])
    patient = Patient(target=target(), drafter=drafter, trained=drafter)
    exam = examine(patient, needs="chain")
    exam.chain = replay(drafter, states(), dataclasses.replace(CONFIG.chain, depth=1, budget=1))
    found = only(check_window(exam), Severity.WARNING)
    assert "falls with the length" in found.what


# -- the machine ------------------------------------------------------------------------------


def test_more_threads_than_cores_are_a_problem() -> None:
    exam = Exam(patient=Patient(target=target(), drafter=None), config=CONFIG)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check = check_threads(exam, count=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    found = only(check, Severity.PROBLEM)
    assert found.what == "3 threads share 2 cores"
    assert set(check.figures["step_seconds"]) == {"1", "2", "3"}


def test_threads_that_wait_for_each_other_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_time_threads", lambda *_: {1: 0.010, 2: 0.100})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    exam = Exam(patient=Patient(target=target(), drafter=None), config=CONFIG)
    found = only(check_threads(exam, count=2), Severity.WARNING)
    assert "one thread is faster than 2" in found.what
    monkeypatch.setattr(machine_checks, "_time_threads", lambda *_: {1: 0.010, 2: 0.006})
    assert check_threads(exam, count=2).status == "fine"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = only(check_threads(exam, count=2), Severity.NOTE)
    assert found.what == "2 threads would be faster than 1"


def test_memory_that_is_short_or_swapped_is_named() -> None:
    exam = Exam(patient=Patient(target=target(), drafter=None), config=CONFIG)
    assert check_memory(exam, free=8 << 30, swapped=0).status == "fine"
    swapped = only(check_memory(exam, free=8 << 30, swapped=1 << 30), Severity.PROBLEM)
    assert "1.1 GB" in swapped.evidence
    assert "hardly any" in only(check_memory(exam, free=1 << 20, swapped=0), Severity.PROBLEM).what


def test_exact_mode_that_is_off_is_a_note_with_its_reason() -> None:
    off = check_exact(pair()[0].target)
    assert off.status == "fine"
    from tests.conftest import random_target

    found = only(check_exact(random_target("llama", exact=False)), Severity.NOTE)
    assert found.evidence == "off as asked"


# -- the report -------------------------------------------------------------------------------


def test_the_exit_status_follows_the_worst_finding() -> None:
    def report(*severities: Severity) -> DoctorReport:
        findings = tuple(
            Finding(severity=s, what="w", evidence="e", advice="a") for s in severities
        )
        return DoctorReport(header={}, checks=[CheckResult(name="x", findings=findings)])

    assert report().exit_code == 0
    assert report(Severity.NOTE, Severity.WARNING).exit_code == 0
    assert report(Severity.NOTE, Severity.PROBLEM).exit_code == 3
    assert report(Severity.NOTE, Severity.PROBLEM).status == "problem"
    assert report(Severity.WARNING, Severity.WARNING).verdict().startswith("2 warnings")
