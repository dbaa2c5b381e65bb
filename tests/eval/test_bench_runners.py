"""Runners in this process: dspark's own, transformers, llama.cpp (a stand-in for its binding)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dspark
from dspark.cache import Cache
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.eval.bench_records import RunOutput
from dspark.eval.runners.base import BenchRequest, Runner
from dspark.eval.runners.hf import ASSISTED, LOOKUP, PLAIN, HFRunner, StockModels
from dspark.eval.runners.llama_cpp import LlamaCppRunner
from dspark.eval.runners.own import OwnRunner
from dspark.request import SamplingParams
from dspark.rounds import RoundLimits
from dspark.target import TargetOutput, TokenBatch
from tests.conftest import VOCAB, random_target
from tests.test_cli import save_model
from tests.test_engine import drafter

TOKENS = [(5, 6, 7, 5, 6, 7, 5, 6), (9, 9, 9), (20, 21, 20, 21, 20, 21, 20), (33, 34, 35, 36)]
REQUESTS = [
    BenchRequest(question_id=k, category="one", text="", token_ids=ids, seed=11 * k)
    for k, ids in enumerate(TOKENS)
]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=20)


def run(runner: Runner, concurrency: int = 1) -> RunOutput:
    shares: list[float] = []
    output = runner.run(REQUESTS, concurrency, shares.append)
    assert shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)
    assert [record.question_id for record in output.requests] == [0, 1, 2, 3]
    return output


def digests(output: RunOutput) -> list[str | None]:
    assert all(record.error is None for record in output.requests)
    return [record.digest for record in output.requests]


# -- dspark -----------------------------------------------------------------------------------


def own(draft: str = "none", params: SamplingParams = GREEDY) -> OwnRunner:
    engine = dspark.Engine(random_target(layers=1, exact=True), drafter=drafter(draft))
    return OwnRunner(engine, params, auto_off=False)


@functools.cache
def plain(params: SamplingParams = GREEDY) -> RunOutput:
    return run(own(params=params))


@pytest.mark.parametrize(
    ("params", "draft"), [(GREEDY, "itself"), (SAMPLED, "none"), (SAMPLED, "lookup")]
)
def test_the_draft_and_the_concurrency_do_not_show_in_the_text(
    params: SamplingParams, draft: str
) -> None:
    assert len(set(digests(plain(params)))) == 4
    assert digests(run(own(draft, params), 3)) == digests(plain(params))


def test_tokens_arrive_round_by_round() -> None:
    """As many as a draft that is always right brings in each round."""
    params = replace(GREEDY, width=1, tree_budget=5)
    config = dspark.EngineConfig(auto_off=False, limits=RoundLimits(keep_rounds=True))
    engine = dspark.Engine(
        random_target(layers=1, exact=True), drafter=drafter("itself"), config=config
    )
    expected = engine.generate([list(ids) for ids in TOKENS], params)
    output = run(own("itself", params))
    for record, result in zip(output.requests, expected, strict=True):
        sizes = [item.committed for item in result.stats.round_log]
        assert max(sizes) > 2
        assert [tokens for _, tokens in record.gaps] == sizes
        assert (record.rounds, record.committed) == (len(sizes), 11)
        times = record.ttft + sum(gap for gap, _ in record.gaps)
        assert times == pytest.approx(record.seconds)
    assert output.rounds == sum(result.stats.rounds for result in expected)
    assert output.tau == pytest.approx(44 / output.rounds)
    for name in ("proposed", "verified", "accepted"):
        total = sum(getattr(result.stats, name) for result in expected)
        assert getattr(output, name) == total > 0

    assert [tokens for _, tokens in plain().requests[0].gaps] == [1] * 11
    assert plain().tau == 1


def test_time_and_cache_of_a_run_are_told() -> None:
    output = run(own("lookup"), 2)
    assert sum(output.stages.values()) == pytest.approx(output.seconds)
    assert all(output.stages[name] > 0 for name in ("prefill", "draft", "verify", "rest"))
    pages = 2  # two requests at a time
    page = random_target(layers=1, exact=True).new_cache().page_bytes()
    assert output.cache_bytes >= pages * page


class Counted:
    """A target that counts the rows it runs."""

    def __init__(self) -> None:
        self.target = random_target(layers=1, exact=True)
        self.info, self.exactness = self.target.info, self.target.exactness
        self.new_cache = self.target.new_cache
        self.rows = 0

    def forward(self, batch: TokenBatch, cache: Cache, **more: object) -> TargetOutput:
        self.rows += batch.num_rows
        return self.target.forward(batch, cache, **more)


def test_no_run_finds_what_the_one_before_left_in_the_cache() -> None:
    """A prompt's prefill would otherwise be free from the second repeat on, as it is in use."""
    long = tuple(3 + i % 50 for i in range(700))
    requests = [replace(REQUESTS[0], token_ids=long)]
    target = Counted()
    engine = dspark.Engine(target)
    runner = OwnRunner(engine, GREEDY, auto_off=False)

    def rows_of(act: Callable[[], object]) -> int:
        before = target.rows
        act()
        return target.rows - before

    runs = [rows_of(lambda: runner.run(requests, 1, lambda share: None)) for _ in range(2)]
    used = [rows_of(lambda: engine.generate([list(long)], GREEDY)) for _ in range(2)]
    assert runs[0] == runs[1] == used[0] >= 700
    assert used[1] < 300


def test_a_prompt_that_cannot_be_run_fails_alone() -> None:
    requests = [REQUESTS[0], replace(REQUESTS[1], token_ids=(5,) * 3000), REQUESTS[2]]
    output = own().run(requests, 2, lambda share: None)
    good, bad, other = output.requests
    assert good.error is other.error is None
    assert "the prompt has 3000 tokens" in bad.error
    assert output.output_tokens == 24


# -- transformers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(module_cache: Path) -> None:
    """Nothing of the user's is read or written."""


def stock(
    folder: str,
    mode: str = PLAIN,
    params: SamplingParams = GREEDY,
    *,
    eos: tuple[int, ...] = (2,),
    assistant: str | None = None,
) -> HFRunner:
    models = StockModels(dtype="float32", device="cpu")
    runner = HFRunner(models, folder, params, eos=eos, mode=mode, assistant=assistant)
    runner.prepare()
    return runner


@pytest.mark.parametrize("concurrency", [1, 3])
def test_transformers_writes_what_dspark_writes(folder: str, concurrency: int) -> None:
    """The same weights and prompts, so greedy decoding agrees, padded batches included."""
    theirs = run(stock(folder), concurrency)
    assert digests(theirs) == digests(plain())
    for record in theirs.requests:
        assert record.output_tokens == 12
        assert [tokens for _, tokens in record.gaps] == [1] * 11
    assert theirs.tau == 1
    assert theirs.stages is None


@pytest.mark.parametrize("mode", [LOOKUP, ASSISTED])
def test_speculation_of_transformers_is_seen_in_its_chunks(
    folder: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An assistant that is the target is always right, where it dares to say anything."""
    runner = stock(folder, mode, assistant=folder if mode == ASSISTED else None)
    assert runner.refuses(1) is None
    assert "one prompt at a time" in runner.refuses(2)
    output = run(runner)
    assert digests(output) == digests(plain())
    assert runner.library["name"] == "transformers"
    assert all(record.output_tokens == 12 for record in output.requests)
    assert output.tau > 1.5 or mode == LOOKUP
    assert output.tau == pytest.approx(
        sum(record.committed for record in output.requests)
        / sum(len(record.gaps) for record in output.requests)
    )
    assert capsys.readouterr().err == ""  # transformers warns of arguments that are its own


def test_end_tokens_end_an_answer_only_if_they_may(folder: str) -> None:
    """An end token chosen so that the first answer has it in its middle."""
    engine = dspark.Engine(random_target(layers=1, exact=True))
    ids = engine.generate([list(TOKENS[0])], GREEDY)[0].token_ids
    eos = next(token for token in ids[3:] if ids.index(token) >= 3)
    end = ids.index(eos) + 1
    for concurrency in (1, 2):
        runner = stock(folder, params=replace(GREEDY, ignore_eos=False), eos=(eos,))
        found = runner.run(REQUESTS[:2], concurrency, lambda share: None)
        assert found.requests[0].output_tokens == end < 12
        full = stock(folder, eos=(eos,)).run(REQUESTS[:2], concurrency, lambda share: None)
        assert full.requests[0].output_tokens == 12


def test_sampling_of_transformers_follows_the_seeds(folder: str) -> None:
    runner = stock(folder, params=SAMPLED)
    first = digests(run(runner))
    assert digests(run(runner)) == first
    assert first != digests(run(stock(folder)))


def test_what_breaks_in_transformers_costs_its_prompts_alone(folder: str) -> None:
    requests = [REQUESTS[0], replace(REQUESTS[1], token_ids=(VOCAB + 5,)), REQUESTS[2]]
    records = stock(folder).run(requests, 1, lambda share: None).requests
    assert records[0].error is records[2].error is None
    assert records[1].error.startswith("transformers: IndexError")
    assert "\n" not in records[1].error


def test_an_assistant_of_another_vocabulary_is_refused(folder: str, tmp_path: Path) -> None:
    import transformers

    small = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="vocabulary of 50 tokens"):
        stock(folder, ASSISTED, assistant=str(tmp_path / "small"))


# -- llama.cpp --------------------------------------------------------------------------------


class StandIn:
    """What the binding's `Llama` offers, counting up from the prompt's last token.

    With a draft it works through three tokens a forward, as the binding does: it asks the draft,
    runs one forward, and yields what was accepted one by one.
    """

    made: dict[str, object]

    def __init__(self, **settings: object) -> None:
        type(self).made = settings
        if "broken" in str(settings["model_path"]):
            raise ValueError("Failed to load model from file")
        self.draft = settings["draft_model"]
        self.is_closed = False

    def n_vocab(self) -> int:
        return VOCAB

    def reset(self) -> None:
        self.was_reset = True

    def set_seed(self, seed: int) -> None:
        assert 0 <= seed < 2**32

    def close(self) -> None:
        self.is_closed = True

    def generate(self, tokens: list[int], **sampling: float) -> Iterator[int]:
        assert self.was_reset
        assert sampling["repeat_penalty"] == 1.0
        if tokens[0] == 9:
            raise RuntimeError("llama_decode returned 1")
        token = tokens[-1]
        while True:
            for _ in range(1 if self.draft is None or token == tokens[-1] else 3):
                token = (token + 1) % VOCAB
                yield token
            if self.draft is not None:
                self.draft(tokens)


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> None:
    module, speculative = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    module.Llama = StandIn
    speculative.LlamaPromptLookupDecoding = lambda **settings: lambda ids, **options: []
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)


def gguf(name: str = "model.gguf", **more: object) -> LlamaCppRunner:
    settings = {"vocab_size": VOCAB, "eos": (40,), "context": 64, "threads": 1, **more}
    params = settings.pop("params", GREEDY)
    return LlamaCppRunner(Path(name), params, **settings)


@pytest.mark.usefixtures("binding")
def test_llama_cpp_answers_one_prompt_after_the_other() -> None:
    runner = gguf()
    runner.prepare()
    assert (StandIn.made["n_threads"], StandIn.made["logits_all"]) == (1, False)
    assert runner.refuses(1) is None
    assert "one prompt at a time" in runner.refuses(2)
    output = runner.run(REQUESTS, 1, lambda share: None)
    fine = output.requests[0]
    assert fine.output_tokens == 12
    assert [tokens for _, tokens in fine.gaps] == [1] * 11
    assert output.requests[1].error == "llama.cpp: llama_decode returned 1."
    assert output.requests[2].error is None
    assert output.requests[3].output_tokens == 12  # 37 .. 48, over the end token
    runner.close()

    ends = gguf(params=replace(GREEDY, ignore_eos=False))
    ends.prepare()
    last = ends.run(REQUESTS, 1, lambda share: None).requests[3]
    assert last.output_tokens == 4  # 37 .. 40


@pytest.mark.usefixtures("binding")
def test_tokens_that_one_forward_accepted_are_one_chunk() -> None:
    runner = gguf(has_lookup=True)
    runner.prepare()
    assert StandIn.made["logits_all"] is True
    output = runner.run(REQUESTS[:1], 1, lambda share: None)
    (record,) = output.requests
    assert [tokens for _, tokens in record.gaps] == [3, 3, 3, 2]
    assert output.tau == pytest.approx(11 / 4)


@pytest.mark.usefixtures("binding")
@pytest.mark.parametrize(
    ("name", "vocab", "error", "message"),
    [
        ("broken.gguf", VOCAB, CheckpointError, "cannot load broken.gguf: Failed to load"),
        ("other.gguf", 50, ConfigError, f"vocabulary of {VOCAB} tokens, but the target's has 50"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_refused(
    name: str, vocab: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gguf(name, vocab_size=vocab).prepare()


def test_without_the_binding_the_runner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(CapabilityError, match="llama-cpp-python is not") as caught:
        gguf().prepare()
    assert caught.value.hint == "pip install llama-cpp-python"
