"""The cost model against published figures, counts of real checkpoints, and sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dspark.base_model.plan import (
    MILLION,
    PlanRequest,
    cache_bytes,
    compare,
    plan_model,
    plan_v32,
)
from dspark.base_model.plan_devices import GPUS, USABLE, Gpu, build_gpu, distinct_experts
from dspark.base_model.plan_parts import CacheBytes, Kind, Store, Tensors, WeightFormat
from dspark.base_model.plan_v3 import V32, v3_cache, v3_flops
from dspark.base_model.plan_v4 import v4_cache, v4_cache_read, v4_flops, v4_tensors
from dspark.base_model.presets import PRESETS, preset

TINY = preset("v4-tiny")


def _plan(name: str, **options: Any) -> Any:
    return plan_model(preset(name), PlanRequest(**options), name=name)


# Parameters


@pytest.mark.parametrize(
    ("name", "total", "active", "draft"),
    [
        ("v4-flash", 284_332_240_471, 13_270_101_591, 6_610_048_891),
        ("v4-flash-dspark", 284_332_240_471, 13_270_101_591, 19_845_850_983),
        ("v4-pro", 1_572_997_201_763, 48_852_402_019, 25_840_145_979),
    ],
)
def test_parameters_of_the_released_models(name: str, total: int, active: int, draft: int) -> None:
    plan = _plan(name)
    assert (plan.parameters, plan.active, plan.draft_parameters) == (total, active, draft)


def test_parameters_round_to_the_published_figures() -> None:
    flash, pro, v32 = _plan("v4-flash-dspark"), _plan("v4-pro"), plan_v32(PlanRequest())
    assert (round(flash.parameters / 1e9), round(flash.active / 1e9)) == (284, 13)
    assert round(flash.draft_parameters / 1e9, 2) == 19.85
    assert (round(pro.parameters / 1e12, 1), round(pro.active / 1e9)) == (1.6, 49)
    assert round(v32.active / 1e9) == 37
    # 671B is V3's figure; V3.2 adds the indexer.
    indexer = 61 * (1536 * 8192 + 7168 * 128 + 7168 * 64 + 2 * 128)
    assert round((v32.parameters - indexer) / 1e9) == 671


def test_draft_stages_take_the_published_bytes() -> None:
    weights = _plan("v4-flash-dspark").weights[WeightFormat.RELEASE]
    assert round(weights[Kind.DRAFT] / 1e9, 2) == 10.86


def _names_in_checkpoint(tensors: list[Tensors]) -> int:
    """Tensor names: a quantised one has a scale, a vector of hyper-connections is two."""
    found = 0
    for t in tensors:
        is_quantised = t.store in (Store.FP4, Store.FP8, Store.FP8_F32)
        is_pair = t.store is Store.F32 and t.cols in ((2 + 4) * 4 + 3, 4 + 1)
        found += t.count * (1 + (is_quantised or is_pair))
    return found


@pytest.mark.parametrize(
    ("name", "total", "draft"),
    [("v4-flash", 69_187, 1_575), ("v4-flash-dspark", 72_317, 4_705)],
)
def test_tensors_are_as_many_as_in_the_real_checkpoints(name: str, total: int, draft: int) -> None:
    tensors = list(v4_tensors(preset(name)))
    assert _names_in_checkpoint(tensors) == total
    assert _names_in_checkpoint([t for t in tensors if t.kind is Kind.DRAFT]) == draft


def test_parameters_of_a_small_model_by_hand() -> None:
    hyper = 24 * 4 * 128 + 24 + 3
    attention = 4 + 64 * 128 + 256 * 64 + 64 * 128 + 64 * 128 + 128 * 64 + 64 + 64
    expert = 3 * 64 * 128
    layer = 2 * hyper + 2 * 128 + attention + 8 * 128 + (8 + 1) * expert
    csa = 2 * 128 * 128 + 4 * 128 + 64
    indexer = 2 * 64 * 128 + 4 * 64 + 32 + 4 * 32 * 64 + 4 * 128
    hca = 2 * 64 * 128 + 8 * 64 + 64
    outside = 2 * 512 * 128 + 128 + 4 * 512 + 4 + 1
    total = 5 * layer + 3 * 8 + 2 * (csa + indexer) + hca + outside
    plan = _plan("v4-tiny")
    assert plan.parameters == total
    assert plan.active == total - 512 * 128 - 5 * 6 * expert


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameters_are_those_of_the_expected_tensors(name: str) -> None:
    names = pytest.importorskip("dspark.base_model.names", exc_type=ImportError)
    if not hasattr(names, "expected_tensors"):
        pytest.skip("names.expected_tensors is not there yet")
    expected = names.expected_tensors(preset(name))
    weights = {
        key: getattr(spec, "shape", spec)
        for key, spec in expected.items()
        if not key.endswith((".scale", "tid2eid"))
    }
    plan = _plan(name)
    drafts = sum(math.prod(shape) for key, shape in weights.items() if key.startswith("mtp."))
    total = sum(math.prod(shape) for shape in weights.values())
    assert (plan.parameters, plan.draft_parameters) == (total - drafts, drafts)


# Weights


def test_bytes_of_a_tensor_in_each_store() -> None:
    def sizes(store: Store) -> list[int]:
        tensor = Tensors(kind=Kind.ROUTED, rows=130, cols=256, store=store)
        return [tensor.bytes_each(weight_format) for weight_format in WeightFormat]

    numbers, blocks = 130 * 256, 2 * 2
    assert sizes(Store.FP4) == [numbers // 2 + 130 * 8, numbers + 4 * blocks, 2 * numbers]
    assert sizes(Store.FP8) == [numbers + blocks, numbers + blocks, 2 * numbers]
    assert sizes(Store.F32) == [4 * numbers] * 3
    assert sizes(Store.I64) == [8 * numbers] * 3


def test_weights_of_a_base_model_are_those_of_the_release_in_fp8() -> None:
    flash, base = _plan("v4-flash").weights, _plan("v4-flash-base").weights
    kinds = [kind for kind in Kind if kind is not Kind.DRAFT]
    for kind in kinds:
        assert base[WeightFormat.RELEASE][kind] == flash[WeightFormat.FP8][kind]
    assert flash[WeightFormat.RELEASE][Kind.ROUTED] == 43 * 256 * 3 * 2048 * 4096 * 17 // 32
    assert flash[WeightFormat.BF16][Kind.ROUTED] == 43 * 256 * 3 * 2048 * 4096 * 2


# Cache


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, CacheBytes()),
        (3, CacheBytes(window=5 * 3 * 64 * 2, buffers=4 * (2 * 3 * 384 + 3 * 128))),
        (
            37,
            CacheBytes(
                window=5 * 16 * 64 * 2,
                csa_entries=2 * 9 * 64 * 2,
                hca_entries=4 * 64 * 2,
                indexer_keys=2 * 9 * 32 * 2,
                buffers=4 * (2 * 7 * 384 + 7 * 128),
            ),
        ),
    ],
)
def test_our_cache_by_hand(tokens: int, expected: CacheBytes) -> None:
    assert cache_bytes(TINY, tokens) == expected
    wide = cache_bytes(TINY, tokens, element_bytes=4)
    assert wide.buffers == expected.buffers
    assert wide.total - wide.buffers == 2 * (expected.total - expected.buffers)


def test_deployed_cache_takes_584_bytes_an_entry_and_68_a_key() -> None:
    held = v4_cache(preset("v4-flash"), MILLION)
    assert held.window == 43 * 128 * 584
    assert held.csa_entries == 21 * (MILLION // 4) * 584
    assert held.hca_entries == 20 * (MILLION // 128) * 584
    assert held.indexer_keys == 21 * (MILLION // 4) * 68
    assert held.buffers == 4 * (21 * 7 * 2560 + 20 * 127 * 1024)
    assert held.total == sum(
        [held.window, held.csa_entries, held.hca_entries, held.indexer_keys, held.buffers]
    )
    assert v3_cache(MILLION).total == 61 * MILLION * (656 + 132)


def test_a_token_reads_the_selected_entries_and_every_key() -> None:
    held, read = v4_cache(TINY, 100), v4_cache_read(TINY, 100)
    assert read == replace(held, csa_entries=2 * 8 * 81, buffers=0)
    assert v4_cache_read(TINY, 12).csa_entries == v4_cache(TINY, 12).csa_entries


# FLOPs


def test_flops_of_a_small_model_by_hand() -> None:
    expert = 3 * 64 * 128
    products = {
        "attention projections": 5 * (64 * 128 + 256 * 64 + 64 * 128 + 64 * 128 + 128 * 64),
        "attention over window": 5 * 16 * 4 * (64 + 64),
        "attention over selection": 2 * 8 * 4 * (64 + 64),
        "attention over HCA entries": 4 * 4 * (64 + 64),
        "compressors": 2 * 2 * 128 * 128 + 2 * 64 * 128,
        "indexer projections": 2 * (2 * 64 * 128 + 4 * 32 * 64 + 4 * 128),
        "indexer scores": 2 * 9 * 4 * 32,
        "routed experts": 5 * 2 * expert,
        "shared experts": 5 * expert,
        "gates": 5 * 8 * 128,
        "hyper-connections": 10 * (24 * 512 + (4 + 16 + 4) * 128) + 4 * 512 + 4 * 128,
        "head": 512 * 128,
    }
    found: dict[str, int] = {}
    for term in v4_flops(TINY, 37):
        found[term.name] = found.get(term.name, 0) + term.flops
    assert found == {name: 2 * count for name, count in products.items()}


def test_v32_attends_to_the_selection_and_scores_every_token() -> None:
    terms = {term.name: term.flops for term in v3_flops(MILLION)}
    assert terms["indexer scores"] == 2 * 61 * 64 * 128 * MILLION
    assert terms["attention over selection"] == 2 * 61 * 128 * (576 + 512) * 2048
    short = {term.name: term.flops for term in v3_flops(100)}
    assert short["attention over selection"] == 2 * 61 * 128 * (576 + 512) * 100


def test_precision_weighs_the_terms() -> None:
    weights = {term.name: term.fp8_equivalent / term.flops for term in v4_flops(TINY, 37)}
    assert weights["indexer scores"] == 0.5
    assert weights["routed experts"] == 1
    assert weights["attention over window"] == 2


@pytest.mark.parametrize(
    ("name", "flops", "unweighted", "cache"),
    [("v4-pro", 0.2738, 0.2619, 0.1051), ("v4-flash", 0.1033, 0.1212, 0.0734)],
)
def test_the_report_is_met_within_two_points(
    name: str, flops: float, unweighted: float, cache: float
) -> None:
    found = compare(_plan(name), plan_v32(PlanRequest()), context=MILLION)
    assert found.published_flops is not None
    assert found.published_cache is not None
    assert abs(found.flops - found.published_flops) < 0.02
    assert abs(found.cache - found.published_cache) < 0.02
    assert found.flops == pytest.approx(flops, abs=5e-5)
    assert found.flops_unweighted == pytest.approx(unweighted, abs=5e-5)
    assert found.cache == pytest.approx(cache, abs=5e-5)


def test_the_report_is_quoted_for_its_models_and_context_only() -> None:
    request = PlanRequest(context=65536)
    assert compare(_plan("v4-pro"), plan_v32(request), context=65536).published_flops is None
    assert _plan("v4-flash-dspark").published == (0.10, 0.07)
    assert _plan("v4-tiny").published is None


# Devices


def test_distinct_experts_of_a_batch() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(8, 2, 2) == pytest.approx(3.5)
    assert distinct_experts(8, 8, 3) == 8


def test_gpus_and_speed_by_hand() -> None:
    gpu = Gpu(name="small", memory=1e6, bandwidth=1e9)
    plan = _plan("v4-tiny", context=100, batch=2, gpus=(gpu,))
    weights = plan.weights[WeightFormat.RELEASE]
    unread = 2 * 512 * 128 + 2 * 512 * 2 * 8  # the embedding and the hash layers' tables
    dense = plan.release_bytes - weights[Kind.ROUTED] - unread
    moved = dense + weights[Kind.ROUTED] * 3.5 / 8 + 2 * plan.cache_read.total
    resident = plan.release_bytes + 2 * plan.cache.total
    assert plan.traffic.dense == dense
    assert plan.gpus[0].needed == math.ceil(resident / (USABLE * 1e6)) == 3
    assert plan.gpus[0].tokens_per_second == pytest.approx(2 * 3 * 1e9 / moved)


def test_experts_on_disk_bound_the_speed() -> None:
    routed = _plan("v4-tiny").weights[WeightFormat.RELEASE][Kind.ROUTED]
    paged = _plan("v4-tiny", context=100, expert_memory=routed / 4, disk_bandwidth=1e6).paged
    assert paged.resident_share == 0.25
    assert paged.missed_bytes == pytest.approx(routed * (2 / 8) * 0.75)
    assert paged.tokens_per_second == pytest.approx(1e6 / (routed * (2 / 8) * 0.75))
    plan = _plan("v4-tiny", context=100, expert_memory=2 * routed, disk_bandwidth=1e6)
    assert plan.paged.tokens_per_second is None
    assert plan.paged.resident_bytes == plan.release_bytes + plan.cache.total


def test_a_gpu_of_the_table_can_be_changed() -> None:
    assert build_gpu("h100-80gb") is not None
    assert build_gpu("H100-80GB") == GPUS["h100-80gb"]
    changed = build_gpu("h100-80gb", 94.0)
    assert (changed.memory, changed.bandwidth) == (94e9, GPUS["h100-80gb"].bandwidth)


def test_v32_has_the_shape_of_its_config() -> None:
    assert (V32.hidden_size, V32.kv_lora_rank, V32.index_topk) == (7168, 512, 2048)
