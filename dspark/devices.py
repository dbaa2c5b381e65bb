"""Devices and dtypes by name, and what "auto" means on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from dspark.errors import ConfigError

__all__ = ["has_native_bfloat16", "pick_device", "pick_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_native_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, Arm BF16)."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


def pick_device(name: str) -> torch.device:
    """Resolve a device name; "auto" is CUDA where there is one.

    Raises:
        ConfigError: If the device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        raise ConfigError(
            f"device {name!r} cannot be used here: {str(exc).splitlines()[0]}",
            hint="use cpu, or auto",
        ) from exc
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve a dtype name; "auto" is bfloat16 where it is computed natively, else float32.

    Raises:
        ConfigError: If there is no such dtype.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"dtype is {name!r}, but must be auto or {', '.join(_DTYPES)}.")
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and not has_native_bfloat16():
        return torch.float32
    return torch.bfloat16
