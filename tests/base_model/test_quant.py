from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.base_model.fp4 import (
    fp4_act_quant,
    pack_codes,
    quantise_fp4,
    recast_fp4_to_fp8,
    unpack_codes,
)
from dspark.base_model.fp8 import act_quant, decode_e4m3, decode_e8m0, quantise_fp8, scale_bytes
from dspark.base_model.stored import StoredWeight
from dspark.errors import CheckpointError, ShapeError

E8M0 = torch.float8_e8m0fnu
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
FP4_NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4_NUMBERS += [-x for x in FP4_NUMBERS]


def fp4(rows: int, columns: int, seed: int = 0, low: int = 100, high: int = 140) -> StoredWeight:
    gen = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=gen)
    scale = torch.randint(low, high, (rows, columns // 32), dtype=torch.uint8, generator=gen)
    return StoredWeight.of("w", packed, scale.view(E8M0))


def fp8(rows: int, columns: int, seed: int = 0, scale_dtype: torch.dtype = E8M0) -> StoredWeight:
    gen = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, generator=gen)
    raw |= torch.randint(0, 2, (rows, columns), dtype=torch.uint8, generator=gen) << 7
    blocks = (-(-rows // 128), -(-columns // 128))
    if scale_dtype == E8M0:
        scale = torch.randint(100, 140, blocks, dtype=torch.uint8, generator=gen).view(E8M0)
    else:
        scale = torch.rand(blocks, generator=gen) + 0.1
    return StoredWeight.of("w", raw.view(torch.float8_e4m3fn), scale)


def slowly(stored: StoredWeight) -> torch.Tensor:
    """The dequantised matrix by the definition, one number at a time, in float64."""
    (rows, columns), is_fp4 = stored.shape, stored.kind == "fp4"
    scale = stored.scale.float().tolist()
    weight = (stored.weight if is_fp4 else stored.weight.double()).tolist()

    def number(i: int, j: int) -> float:
        if is_fp4:
            byte = weight[i][j // 2] & 0xFF
            code = byte >> 4 if j % 2 else byte & 15
            return FP4_NUMBERS[code] * scale[i][j // 32]
        return weight[i][j] * scale[i // 128][j // 128]

    numbers = [[number(i, j) for j in range(columns)] for i in range(rows)]
    return torch.tensor(numbers, dtype=torch.float64)


def test_every_e8m0_byte_is_its_power_of_two():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        decoded = decode_e8m0(ALL_BYTES.view(E8M0), dtype)
        assert decoded[:255].double().tolist() == [2.0 ** (b - 127) for b in range(255)]
        assert decoded[255].isnan()


def test_every_e4m3_byte_decodes_as_torch_casts_it_and_round_trips():
    codes = ALL_BYTES.view(torch.float8_e4m3fn).view(16, 16)
    for columns in (16, 1):  # two codes an index, and one
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(256 // columns, columns, dtype=dtype)
            decode_e4m3(codes.reshape(-1, columns), out)
            wanted = codes.float().reshape(-1, columns).to(dtype)
            assert torch.equal(out.nan_to_num(999), wanted.nan_to_num(999))
            back = out.float().to(torch.float8_e4m3fn).view(torch.uint8).flatten()
            assert torch.equal(back & 0x7F, ALL_BYTES & 0x7F)
            assert torch.equal(back[:127], ALL_BYTES[:127])


@pytest.mark.parametrize("tag", [torch.int8, torch.uint8, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_nibbles_of_every_fp4_byte_decode_low_first(tag, dtype):
    packed = ALL_BYTES.view(16, 16)
    scale = torch.full((16, 1), 127, dtype=torch.uint8).view(E8M0)
    got = StoredWeight.of("w", packed.view(tag), scale).dequantise(dtype)
    wanted = [[FP4_NUMBERS[b & 15], FP4_NUMBERS[b >> 4]] for b in range(256)]
    wanted = torch.tensor(wanted, dtype=dtype).view(16, 32)
    assert torch.equal(got, wanted)
    assert torch.equal(torch.signbit(got), torch.signbit(wanted))
    assert torch.equal(pack_codes(unpack_codes(packed)).view(torch.uint8), packed)


SHAPES = {
    "fp4": lambda: fp4(5, 64),
    "fp4-one-group": lambda: fp4(3, 32),
    "fp8-odd": lambda: fp8(130, 131),
    "fp8-narrow": lambda: fp8(129, 96),
    "fp8-wide": lambda: fp8(5, 257),
    "fp8-f32-scales": lambda: fp8(131, 129, scale_dtype=torch.float32),
}


@functools.cache
def with_its_numbers(shape: str) -> tuple[StoredWeight, torch.Tensor]:
    stored = SHAPES[shape]()
    return stored, slowly(stored)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_follows_the_definition(shape, dtype):
    stored, exact = with_its_numbers(shape)
    got = stored.dequantise(dtype)
    via_float = exact.float() if dtype != torch.float64 else exact
    assert torch.equal(got, via_float.to(dtype))
    buffer = torch.full_like(got, 7)
    assert stored.dequantise(dtype, out=buffer) is buffer
    assert torch.equal(buffer, got)


@given(
    rows=st.integers(1, 300),
    columns=st.sampled_from([32, 96, 160]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    is_fp4=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=40)
def test_rows_of_a_weight_are_the_rows_of_the_whole(rows, columns, cut, is_fp4, dtype):
    stored = (fp4 if is_fp4 else fp8)(rows, columns)
    start, stop = sorted(round(part * rows) for part in cut)
    assert torch.equal(stored.dequantise(dtype, start, stop), stored.dequantise(dtype)[start:stop])


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), groups=st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_quantising_fp4_again_changes_nothing(seed, rows, groups):
    stored = fp4(rows, 32 * groups, seed, 8, 247)
    values = stored.dequantise(torch.float32)
    once = StoredWeight.of("w", *quantise_fp4(values))
    assert torch.equal(once.dequantise(torch.float32), values)
    weight, scale = quantise_fp4(once.dequantise(torch.float32))
    assert torch.equal(weight, once.weight)
    assert torch.equal(scale.view(torch.uint8), once.scale.view(torch.uint8))


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 200), columns=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_quantising_fp8_again_changes_nothing(seed, rows, columns):
    gen = torch.Generator().manual_seed(seed)
    rounded = StoredWeight.of("w", *quantise_fp8(torch.randn(rows, columns, generator=gen)))
    values = rounded.dequantise(torch.float32)
    once = StoredWeight.of("w", *quantise_fp8(values))  # its scale may be half: 225 becomes 224
    assert torch.equal(once.dequantise(torch.float32), values)
    weight, scale = quantise_fp8(once.dequantise(torch.float32))
    assert torch.equal(weight.view(torch.uint8), once.weight.view(torch.uint8))
    assert torch.equal(scale.view(torch.uint8), once.scale.view(torch.uint8))


def test_quantisation_errors_stay_under_half_a_step():
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(1)) * 0.03
    e4m3 = StoredWeight.of("w", *quantise_fp8(weight))
    error = (e4m3.dequantise(torch.float64) - weight.double()).abs()
    least = decode_e8m0(e4m3.scale, torch.float64).repeat_interleave(128, 0)[:200]
    least = least.repeat_interleave(128, 1)[:, :320] * 2**-10  # half of the subnormal step
    assert bool((error <= torch.maximum(weight.double().abs() * 2**-4, least)).all())
    e2m1 = StoredWeight.of("w", *quantise_fp4(weight))
    error = (e2m1.dequantise(torch.float64) - weight.double()).abs()
    step = decode_e8m0(e2m1.scale, torch.float64).repeat_interleave(32, 1)
    assert bool((error <= torch.maximum(weight.double().abs() * 2**-2, step * 0.25)).all())


def test_the_scale_is_the_least_power_of_two_that_does_not_overflow():
    """Also just under and over the limit, where a logarithm in float32 fails."""
    exponents = torch.arange(-100, 100, dtype=torch.float64)
    for top, largest in (((8, 0x600000), 448.0), ((2, 0x400000), 6.0)):
        limit = (largest * 2.0**exponents).float()
        for amax, up in ((limit, 0), (torch.nextafter(limit, limit * 2), 1), (limit * 0.999, 0)):
            scale = decode_e8m0(scale_bytes(amax, top), torch.float64)
            assert torch.equal(scale, 2.0 ** (exponents + up))


def test_halfway_fp4_numbers_go_to_the_even_code():
    values = torch.zeros(1, 32)
    values[0, :9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25])
    got = StoredWeight.of("w", *quantise_fp4(values)).dequantise(torch.float32)
    assert got[0, :9].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0]
    assert bool(torch.signbit(got[0, 8]))


@given(seed=st.integers(0, 2**31), low=st.integers(8, 230), spread=st.integers(1, 15))
@settings(deadline=None, max_examples=30)
def test_an_fp8_recast_of_fp4_holds_the_same_numbers(seed, low, spread):
    stored = fp4(150, 160, seed, low, low + spread)
    recast = StoredWeight.of("w", *recast_fp4_to_fp8(stored.weight, stored.scale))
    assert torch.equal(recast.dequantise(torch.float64), stored.dequantise(torch.float64))


def test_a_recast_that_would_lose_something_is_refused():
    stored = fp4(2, 64, low=120, high=121)
    scale = stored.scale.view(torch.uint8).clone()
    scale[0, 0] -= 15
    with pytest.raises(CheckpointError, match=r"differ by 2\^15, but e4m3 holds at most 2\^14"):
        recast_fp4_to_fp8(stored.weight, scale.view(E8M0))
    zeros = stored.weight.clone()
    zeros[0, :16] = 0  # the same scale, but over zeros
    recast_fp4_to_fp8(zeros, scale.view(E8M0))
    scale[0, 0] = 255
    with pytest.raises(CheckpointError, match="not a number"):
        recast_fp4_to_fp8(stored.weight, scale.view(E8M0))


def test_fake_quantisation_is_quantising_and_dequantising():
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(2))
    flat = x.view(15, 256)
    assert torch.equal(
        fp4_act_quant(x).view(15, 256),
        StoredWeight.of("x", *quantise_fp4(flat)).dequantise(torch.float32),
    )
    row = StoredWeight.of("x", *quantise_fp8(flat[:1])).dequantise(torch.float32)
    assert torch.equal(act_quant(x).view(15, 256)[:1], row)
    assert act_quant(x.bfloat16(), 64).dtype == torch.bfloat16
    assert torch.equal(act_quant(torch.zeros(2, 128)), torch.zeros(2, 128))
    with pytest.raises(ShapeError, match="multiple of the group 100"):
        act_quant(x, 100)


def test_floats_of_the_same_dtype_are_not_copied():
    stored = StoredWeight.of("w", torch.randn(4, 6))
    assert stored.dequantise(torch.float32, 1, 3).data_ptr() == stored.weight[1].data_ptr()
    assert stored.dequantise(torch.bfloat16).dtype == torch.bfloat16
    assert (stored.kind, stored.shape, stored.nbytes) == ("float", (4, 6), 96)


def test_a_nan_scale_makes_its_weights_nan():
    stored = fp4(2, 64)
    scale = stored.scale.view(torch.uint8).clone()
    scale[1, 1] = 255
    got = StoredWeight.of("w", stored.weight, scale).dequantise(torch.bfloat16)
    assert got.isnan().sum() == 32
    assert bool(got[1, 32:].isnan().all())


E4M3 = torch.zeros(130, 130).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (E4M3, None, "w is stored as float8_e4m3fn, which needs a scale, but has none."),
        (E4M3, torch.ones(2, 1), r"has a scale of \[2, 1\], but needs \[2, 2\]"),
        (E4M3, torch.ones(2, 2).double(), "scale of float64, but it must be"),
        (E4M3[0], torch.ones(1), "two dimensions"),
        (torch.zeros(2, 2), torch.ones(1, 1), "takes no scale"),
        (torch.zeros(2, 24, dtype=torch.int8), torch.ones(2, 1), "multiple of 32"),
        (torch.zeros(2, 2, dtype=torch.int64), None, "stored as int64, but must be"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(weight, scale, message):
    with pytest.raises(CheckpointError, match=message):
        StoredWeight.of("w", weight, scale)


def test_wrong_rows_and_buffers_are_refused():
    stored = fp8(4, 4)
    with pytest.raises(ShapeError, match="rows 3 to 5"):
        stored.dequantise(torch.float32, 3, 5)
    with pytest.raises(ShapeError, match="out is"):
        stored.dequantise(torch.float32, out=torch.empty(4, 5))


def test_infinite_weights_are_not_quantised():
    weight = torch.zeros(32, 32)
    weight[3, 3] = torch.inf
    for quantise in (quantise_fp4, quantise_fp8):
        with pytest.raises(CheckpointError, match="infinite or not a number"):
            quantise(weight)
