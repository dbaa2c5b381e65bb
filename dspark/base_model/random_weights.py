"""Random weights under the real names, for tests and benchmarks.

Every branch of the model matters with them: sinks, position biases, hyper-connections and gate
biases are not zero, and activations neither vanish nor explode. Experts are random bytes, not
quantised numbers, so that gigabytes take seconds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dspark.base_model.config import V4Config
from dspark.base_model.fp4 import GROUP
from dspark.base_model.fp8 import BLOCK, decode_e8m0
from dspark.base_model.names import Storage, TensorSpec, expected_tensors

__all__ = ["random_tensors"]

_FP4_RMS = 2.93  # of the 16 codes
_FP8_RMS = 75.0  # of the codes of exponents 12 and 13, which `_fp8` draws
_HEAD_GAIN = 3.0  # so that the next token is not a toss-up
_ROWS = 4096  # of a table of expert ids made at a time


def random_tensors(
    config: V4Config, *, seed: int = 0, quantised: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Random weights under official names, scales included; each depends on seed and name only.

    Args:
        config: Their shapes; `expert_dtype` "fp8" gives FP8 experts with float32 scales (Base).
        seed: Equal seeds give equal weights.
        quantised: As the release stores weights, or all in bfloat16.
    """
    for name, spec in expected_tensors(config).items():
        gen = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if quantised and spec.storage in (Storage.FP8, Storage.EXPERT):
            is_fp4 = spec.storage is Storage.EXPERT and config.expert_dtype == "fp4"
            weight, scale = (_fp4 if is_fp4 else _fp8)(spec.shape, gen)
            if spec.storage is Storage.EXPERT and not is_fp4:
                scale = decode_e8m0(scale)  # as in the Base checkpoints
            yield name, weight
            yield name.removesuffix("weight") + "scale", scale
        elif spec.storage is Storage.I64:
            yield name, _expert_ids(spec.shape, config.n_routed_experts, gen)
        else:
            yield name, _floats(name, spec, gen)


def _floats(name: str, spec: TensorSpec, gen: torch.Generator) -> Tensor:
    mean, std = _moments(name, spec.shape)
    values = torch.randn(spec.shape, generator=gen).mul_(std).add_(mean)
    return values if spec.storage is Storage.F32 else values.bfloat16()


def _moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return 1.0, 0.1
    if leaf.startswith("hc_"):
        # x in the mixing is normalised, so fn of this size gives mixes of size 1 before the scale.
        kinds = {"fn": (0.0, shape[-1] ** -0.5), "base": (0.0, 0.5), "scale": (0.7, 0.1)}
        return kinds[leaf.rsplit("_", 1)[-1]]
    kinds = {
        "embed": (0.0, 1.0),
        "markov_w1": (0.0, 1.0),
        "head": (0.0, _HEAD_GAIN * shape[-1] ** -0.5),
        "attn_sink": (0.0, 1.0),
        "ape": (0.0, 0.5),
        "bias": (0.0, 0.1),
    }
    return kinds.get(leaf, (0.0, shape[-1] ** -0.5))


def _expert_ids(shape: tuple[int, ...], experts: int, gen: torch.Generator) -> Tensor:
    """Distinct expert ids in every row."""
    rows, chosen = shape
    out = torch.empty(shape, dtype=torch.int64)
    for start in range(0, rows, _ROWS):
        count = min(_ROWS, rows - start)
        order = torch.rand(count, experts, generator=gen).argsort(dim=1)
        out[start : start + count] = order[:, :chosen]
    return out


def _fp4(shape: tuple[int, ...], gen: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    packed = _bytes((rows, columns // 2), gen).view(torch.int8)
    middle = 127 + round(math.log2(columns**-0.5 / _FP4_RMS))
    scale = _bytes((rows, columns // GROUP), gen) % 2 + middle  # two sizes, so that scales matter
    return packed, scale.view(torch.float8_e8m0fnu)


def _fp8(shape: tuple[int, ...], gen: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    # Sign, one bit of the exponent and the mantissa are random: no NaN, no far outliers.
    codes = _bytes(shape, gen).bitwise_and_(0x8F).bitwise_or_(0x60)
    middle = 127 + round(math.log2(columns**-0.5 / _FP8_RMS))
    scale = _bytes((-(-rows // BLOCK), -(-columns // BLOCK)), gen) % 2 + (middle - 1)
    return codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def _bytes(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Random bytes, eight to a draw."""
    count = math.prod(shape)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=gen)
    return words.view(torch.uint8)[:count].view(shape)
