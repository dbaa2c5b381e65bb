"""V4's routed experts in C++ (kernels/experts.cpp), compiled on demand and called by ctypes.

They read packed FP4 as checkpoints store it, mapped or paged, decode it in registers and take all
the experts of a layer's rows in two calls. In exact mode they cost nothing: a row has the same bits
in any company. What they do not know (other storage, devices and dtypes, gradients) goes the way of
`dspark.base_model.moe` through torch.

Letters: n rows, D hidden size, I inner size of an expert, P pairs of a row and an expert.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark import native
from dspark.base_model.fp8 import act_quant
from dspark.errors import CapabilityError
from dspark.models.store import cache_root

if TYPE_CHECKING:
    from dspark.base_model.checkpoint import Checkpoint
    from dspark.base_model.expert_store import ExpertWeights
    from dspark.base_model.numerics import Numerics
    from dspark.base_model.stored import StoredWeight
    from dspark.registry import LoadOptions

__all__ = ["ExpertKernels", "KernelStep", "choose_kernels", "load_kernels"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "kernels"
_VECTORS = Path(native.__file__).parent / "adapters" / "fused" / "kernels" / "vectors.h"
_SOURCES = native.Sources("experts", _FOLDER / "experts.cpp", (_FOLDER / "fp4.h", _VECTORS))
_CODES = 8  # of a word
_DTYPES = (torch.float32, torch.bfloat16)
_LEAST_WEIGHTS = 10_000_000
"""Models with fewer weights in experts take torch unless asked: compiling would not pay."""


class _Expert(ctypes.Structure):
    """One expert's bytes, and which of the pairs are its own."""

    _fields_ = (
        *(
            (f"{matrix}_{part}", c_void_p)
            for matrix in ("w1", "w3", "w2")
            for part in ("", "scale")
        ),
        ("first", c_int64),
        ("pairs", c_int64),
    )


class _Group(ctypes.Structure):
    """One call: some experts over the rows that were routed to them."""

    _fields_ = (
        ("experts", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("threads", c_int64),
        ("is_rounded", c_int64),
        ("expert", c_void_p),
        ("row", c_void_p),
        ("weight", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("limit", c_float),
    )


class ExpertKernels:
    """The loaded kernels.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.fingerprint = path.stem
        library.dspark_lanes.restype = c_int64
        self.lanes = int(library.dspark_lanes())
        self.gate_up = library.dspark_gate_up
        self.down = library.dspark_down
        for function in (self.gate_up, self.down):
            function.restype = None
            function.argtypes = [c_void_p]

    def can_run(self, x: Tensor, numerics: Numerics) -> bool:
        """Whether rows x [n, D] are of a kind that the kernels compute."""
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        return x.device.type == "cpu" and numerics.dtype in _DTYPES and not needs_gradient

    def can_read(self, of: ExpertWeights, hidden: int, inner: int) -> bool:
        """Whether an expert is stored as the kernels read it, in the shape that they will."""
        return (
            _is_packed(of.w1, inner, hidden)
            and _is_packed(of.w3, inner, hidden)
            and _is_packed(of.w2, hidden, inner)
        )

    def arrange(self, x: Tensor) -> Tensor:
        """Rows [n, K] in the order in which codes are decoded, padded with zeros: float32."""
        chunk = _CODES * self.lanes
        padded = F.pad(x.float(), (0, -x.shape[1] % chunk))
        chunks = padded.reshape(len(x), padded.shape[1] // chunk, self.lanes, _CODES)
        return chunks.transpose(-1, -2).contiguous()


class KernelStep:
    """One layer's rows on their way through experts, some experts at a time.

    Args:
        kernels: The kernels.
        x: [n, D].
        rows: int64 [P], the row of each pair, pairs of one expert beside each other.
        weights: float32 [P], the routing's.
        inner: I.
        limit: Of gate and up; 0 for none.
        numerics: How the model rounds.
    """

    def __init__(
        self,
        kernels: ExpertKernels,
        x: Tensor,
        rows: Tensor,
        weights: Tensor,
        *,
        inner: int,
        limit: float,
        numerics: Numerics,
    ) -> None:
        self._kernels = kernels
        self._rows = rows.contiguous()
        self._weights = weights.float().contiguous()
        self._shape = (x.shape[1], inner)
        self._limit = limit
        self._numerics = numerics
        self._x = kernels.arrange(act_quant(x) if numerics.fake_quant else x)

    def add(self, group: Sequence[tuple[ExpertWeights, int, int]], out: Tensor) -> None:
        """Run experts, and add what they give to the rows, one expert after the other.

        Args:
            group: Experts that `ExpertKernels.can_read`, each with its first pair and how many it
                has; their pairs lie beside each other.
            out: float32 [n, D], contiguous, added to.
        """
        start = group[0][1]
        pairs = group[-1][1] + group[-1][2] - start
        experts = (_Expert * len(group))(
            *(_expert(of, first - start, count) for of, first, count in group)
        )
        inner = torch.empty(pairs, self._shape[1])
        call = _Group(
            len(group),
            *self._shape,
            torch.get_num_threads(),
            int(self._numerics.dtype == torch.bfloat16),
            ctypes.addressof(experts),
            self._rows.data_ptr() + start * self._rows.itemsize,
            self._weights.data_ptr() + start * self._weights.itemsize,
            self._x.data_ptr(),
            inner.data_ptr(),
            self._limit,
        )
        self._kernels.gate_up(ctypes.byref(call))
        arranged = self._kernels.arrange(act_quant(inner) if self._numerics.fake_quant else inner)
        call.x, call.out = arranged.data_ptr(), out.data_ptr()
        self._kernels.down(ctypes.byref(call))


def choose_kernels(
    checkpoint: Checkpoint,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    options: LoadOptions,
) -> ExpertKernels | None:
    """The kernels for a checkpoint's routed experts, compiled now if need be.

    Args:
        checkpoint: The checkpoint.
        devices: Where its layers will be.
        dtype: Of activations.
        options: `path` says whether kernels are wanted (`dspark.native.PATHS`); "auto" takes them
            where they can be had, but for models so small that compiling would not pay, and for
            forwards of hundreds of rows.

    Returns:
        None for torch.

    Raises:
        ConfigError: If the path is none of PATHS.
        CapabilityError: If kernels were asked for and cannot be had.
    """
    wanted = native.wanted_path(options.path)
    if wanted == "plain" or options.has_many_rows:
        return None
    if wanted == "auto" and _weights_in_experts(checkpoint) < _LEAST_WEIGHTS:
        return None
    reason = _obstacle(checkpoint, devices, dtype)
    if reason is None:
        try:
            return load_kernels(cache_root() / "kernels")
        except native.NotCompiled as exc:
            reason = str(exc)
    if wanted == "fused":
        raise CapabilityError(
            f"the kernels for experts cannot be taken for {options.name}: {reason}.",
            hint="leave the choice to dspark, or take the plain path",
        )
    logger.info("the experts of %s go through torch: %s", options.name, reason)
    return None


def load_kernels(folder: Path, flags: Sequence[str] = native.FLAGS) -> ExpertKernels:
    """Load the kernels, compiling them if this machine has not done so yet.

    Args:
        folder: Where compiled kernels are kept.
        flags: What the compiler is told.

    Raises:
        NotCompiled: If there is no compiler, or it fails.
    """
    return _load(folder, os.environ.get("CXX"), tuple(flags))


@functools.cache
def _load(folder: Path, compiler: str | None, flags: tuple[str, ...]) -> ExpertKernels:
    path = native.compile_once(_SOURCES, folder, compiler=compiler, flags=flags)
    try:
        return ExpertKernels(path)
    except (OSError, AttributeError) as exc:
        raise native.NotCompiled(f"the compiled kernels cannot be loaded: {exc}") from exc


def _is_packed(stored: StoredWeight, outputs: int, inputs: int) -> bool:
    scale = stored.scale
    return (
        scale is not None
        and stored.kind == "fp4"
        and scale.dtype == torch.float8_e8m0fnu
        and stored.shape == (outputs, inputs)
        and stored.weight.device.type == "cpu"
        and stored.weight.is_contiguous()
        and scale.is_contiguous()
    )


def _expert(of: ExpertWeights, first: int, pairs: int) -> _Expert:
    places = []
    for stored in (of.w1, of.w3, of.w2):
        if stored.scale is not None:
            places += [stored.weight.data_ptr(), stored.scale.data_ptr()]
    return _Expert(*places, first, pairs)


def _weights_in_experts(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return config.num_hidden_layers * config.n_routed_experts * one


def _obstacle(
    checkpoint: Checkpoint, devices: Sequence[torch.device], dtype: torch.dtype
) -> str | None:
    """Why the kernels cannot run a model, as the rest of a sentence; None if they can."""
    elsewhere = [device for device in devices if device.type != "cpu"]
    if elsewhere:
        return f"layers are on {elsewhere[0]}"
    if dtype not in _DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}"
    name = "layers.0.ffn.experts.0.w1"
    weight = checkpoint.piece(f"{name}.weight")
    scale = checkpoint.piece(f"{name}.scale") if f"{name}.scale" in checkpoint else None
    if weight.dtype not in (torch.int8, torch.uint8) or scale is None:
        return "its experts are not stored in FP4"
    has_powers = scale.dtype in (torch.float8_e8m0fnu, torch.uint8)
    return None if has_powers else "the scales of its experts are not powers of two"
