"""The proposer for vLLM, by a double of the code that calls it in vLLM 0.33."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dspark.errors import CapabilityError
from dspark.plugins.chains import ChainSettings
from dspark.plugins.vllm import LookupProposer
from tests.conftest import random_model

LONGEST = 256


def config(**changes):
    """The parts of vLLM's config that are read."""
    values = {"num_speculative_tokens": 4, "max_model_len": LONGEST, **changes}
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=values["num_speculative_tokens"]),
        model_config=SimpleNamespace(max_model_len=values["max_model_len"]),
    )


class Batch:
    """vLLM's input batch: rows of a buffer that is never cleared.

    As in 0.33: a request that ends, or is not scheduled in a step, leaves its row, and the last row
    moves into the gap; sampled tokens are written down and counted before the proposer is called,
    which gets the whole buffers; rows of unfinished prompts have no sampled tokens.
    """

    def __init__(self, proposer, rows=8):
        self.proposer = proposer
        self.names = []
        self.texts = np.full((rows, LONGEST), 7, dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)

    def add(self, name, prompt):
        row = len(self.names)
        self.names.append(name)
        self.texts[row, : len(prompt)] = prompt
        self.lengths[row] = len(prompt)

    def remove(self, name):
        row, last = self.names.index(name), len(self.names) - 1
        text = self.texts[row, : self.lengths[row]].tolist()
        self.texts[row], self.lengths[row] = self.texts[last], self.lengths[last]
        self.names[row] = self.names[last]
        self.names.pop()
        return text

    def step(self, sampled):
        """One forward: {name: sampled tokens}; drafts by name."""
        given = [sampled.get(name, []) for name in self.names]
        for row, tokens in enumerate(given):
            start = self.lengths[row]
            self.texts[row, start : start + len(tokens)] = tokens
            self.lengths[row] += len(tokens)
        before = self.texts.copy()
        drafts = self.proposer.propose(given, self.lengths, self.texts, slot_mappings=None)
        assert len(drafts) == len(self.names)
        assert np.array_equal(before, self.texts)
        assert all(len(draft) <= 4 and all(type(t) is int for t in draft) for draft in drafts)
        return dict(zip(self.names, drafts, strict=True))


def decode(batch, laws, count):
    """Decode with the drafts verified; forwards per request and the texts.

    Args:
        laws: {name: function from a text to its next token}.
        count: Tokens for each request.
    """
    made = dict.fromkeys(laws, 0)
    forwards = dict.fromkeys(laws, 0)
    drafts = {name: [] for name in laws}
    while any(made[name] < count for name in laws):
        sampled = {}
        for name in [n for n in batch.names if made.get(n, count) < count]:
            row = batch.names.index(name)
            text = batch.texts[row, : batch.lengths[row]].tolist()
            out = []
            for drafted in [*drafts[name], None]:
                out.append(laws[name]([*text, *out]))
                if out[-1] != drafted:
                    break
            sampled[name] = out[: count - made[name]]
            made[name] += len(sampled[name])
            forwards[name] += 1
        drafts.update(batch.step(sampled))
        drafts = {name: drafts[name] for name in laws}
    return forwards


def cycle(*tokens):
    return lambda text: tokens[len(text) % len(tokens)]


def test_repeating_requests_need_few_forwards_and_keep_their_own_texts():
    batch = Batch(LookupProposer(config()))
    laws = {"a": cycle(*range(10, 15)), "b": cycle(*range(20, 31)), "c": lambda t: 100 + len(t)}
    for name in laws:
        batch.add(name, [1, 2, 3, ord(name)])
    forwards = decode(batch, laws, 60)
    assert forwards["a"] < 25
    assert forwards["b"] < 35
    assert forwards["c"] == 60  # it never repeats
    for row, name in enumerate(batch.names):
        text = batch.texts[row, : batch.lengths[row]].tolist()
        assert text[4:] == [laws[name](text[:place]) for place in range(4, 64)]


def test_a_row_is_recognised_after_others_left_and_after_a_pause():
    batch = Batch(LookupProposer(config()))
    texts = {name: [ord(name) + i for i in range(0, 180, 9)] for name in "abc"}
    for name, text in texts.items():
        batch.add(name, text)
    batch.step({name: [texts[name][0]] for name in texts})
    expected = {name: texts[name][2:6] for name in texts}
    batch.remove("a")  # c takes its row
    assert batch.step({name: [texts[name][1]] for name in "bc"}) == {n: expected[n] for n in "bc"}
    paused = batch.remove("b")
    batch.step({"c": [texts["c"][2]]})
    batch.add("d", [5, 6, 5])
    batch.step({"c": [texts["c"][3]], "d": [6]})
    batch.add("b", paused)  # resumed, in another row
    assert batch.step({"b": [texts["b"][2]]})["b"] == texts["b"][3:7]


def test_a_request_that_moves_is_not_read_as_a_new_text():
    proposer = LookupProposer(config())
    batch = Batch(proposer)
    rng = np.random.default_rng(0)
    for name in "abcd":
        batch.add(name, rng.integers(0, 50, 200).tolist())
    for _ in range(10):
        batch.step({name: [1] for name in batch.names})
        if len(batch.names) > 2:
            batch.remove(batch.names[0])
    assert proposer.num_texts == 4


def test_texts_that_left_are_forgotten_in_the_end():
    proposer = LookupProposer(config())
    batch = Batch(proposer)
    for place in range(100):
        batch.add(place, [place + i for i in range(0, 90, 3)])
        batch.step({place: [1]})
        batch.remove(place)
    assert 1 < proposer.num_texts < 80


def test_unfinished_prompts_and_full_rows_get_no_draft():
    batch = Batch(LookupProposer(config()))
    batch.add("a", [1, 2, 3, 1, 2])
    assert batch.step({}) == {"a": []}
    assert batch.step({"a": [3]}) == {"a": [1, 2, 3, 1]}
    batch.add("full", [1, 2] * ((LONGEST - 2) // 2))
    assert len(batch.step({"full": [1]})["full"]) <= 1
    assert batch.step({"full": [2]})["full"] == []


def test_settings_are_those_of_a_derived_class():
    class Mine(LookupProposer):
        settings = ChainSettings(row_cost=0.0)
        corpus = (range(50, 90),)

    batch = Batch(Mine(config(num_speculative_tokens=3)))
    batch.add("a", [1, *range(50, 70)])
    assert batch.step({"a": [70]}) == {"a": [71, 72, 73]}


@pytest.mark.parametrize(
    "wrong",
    [
        config(num_speculative_tokens=None),
        config(max_model_len="256"),
        SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST)),
    ],
    ids=["tokens", "length", "no-config"],
)
def test_another_config_is_refused_in_one_sentence(wrong):
    with pytest.raises(CapabilityError, match=r"unlike vLLM 0\.33, whose custom proposers dspark"):
        LookupProposer(wrong)


def test_another_call_is_refused_in_one_sentence():
    proposer = LookupProposer(config())
    lengths, texts = np.array([3]), np.zeros((1, LONGEST), dtype=np.int32)
    for arguments in [
        (4, [[1]], lengths),  # a count first, as for vLLM's own n-gram proposer
        ([[1]], lengths, lengths),
        ([[1]], 3, texts),
        ([[1], [2]], lengths, texts),
        ([[1]], lengths.astype(float), texts),
    ]:
        with pytest.raises(CapabilityError, match=r"unlike vLLM 0\.33"):
            proposer.propose(*arguments)
    assert proposer.propose([[0]], lengths, texts, slot_mappings={}, added_later=1) == [[0] * 3]


def test_the_runner_for_cpus_asks_it_to_load_a_model():
    proposer = LookupProposer(config())
    assert proposer.load_model(object()) is None
    assert proposer.num_texts == 0


def test_vllms_own_loader_takes_it():
    """Where vLLM can be imported: its factory makes the class and finds what it needs."""
    factory = pytest.importorskip(
        "vllm.v1.spec_decode.custom_class_proposer", reason="vLLM is not installed"
    )
    engine = config()
    engine.speculative_config.model = "dspark.plugins.vllm.LookupProposer"
    proposer = factory.create_custom_proposer(engine)
    assert isinstance(proposer, LookupProposer)
    batch = Batch(proposer)
    batch.add("a", [1, 2, 3, 1, 2])
    assert batch.step({"a": [3]}) == {"a": [1, 2, 3, 1]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
def test_vllms_engine_keeps_its_texts_and_needs_fewer_forwards(tmp_path, monkeypatch):
    """Where a build for CPUs is installed: three requests at once, on a tiny model."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    torch = pytest.importorskip("torch")
    random_model("qwen3", layers=4).save_pretrained(tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # it replaces it
    prompts = [[5, 9, 3, 11, 40, 7], [81, 2, 60], [17, 17, 30, 64]]
    params = vllm.SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
    steps = []
    propose = LookupProposer.propose

    def record(self, *args, **options):
        made = propose(self, *args, **options)
        steps.append(made)
        return made

    def decode(speculative):
        llm = vllm.LLM(
            str(tmp_path),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=LONGEST,
            max_num_seqs=4,
            kv_cache_memory_bytes=2**26,
            speculative_config=speculative,
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(requests, params, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
        return [list(result.outputs[0].token_ids) for result in results]

    plain = decode(None)
    assert steps == []
    monkeypatch.setattr(LookupProposer, "propose", record)
    monkeypatch.setattr(LookupProposer, "corpus", tuple(map(tuple, plain)))
    monkeypatch.setattr(LookupProposer, "settings", ChainSettings(row_cost=0.0))
    speculative = {
        "method": "custom_class",
        "model": "dspark.plugins.vllm.LookupProposer",
        "num_speculative_tokens": 4,
    }
    assert decode(speculative) == plain
    assert any(len(step) == len(prompts) for step in steps)
    assert len(steps) < 40 / 2
