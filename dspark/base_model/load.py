"""Load a V4 checkpoint as a Target: weights mapped or paged, dtype, devices, exact mode, codec."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dspark import exactness
from dspark.base_model.chat_codec import load_v4_codec
from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.expert_store import ExpertStore, PagedExperts, ResidentExperts
from dspark.base_model.model import V4Model
from dspark.base_model.native_experts import choose_kernels
from dspark.base_model.target import V4Target
from dspark.devices import pick_device, pick_dtype
from dspark.errors import CapabilityError
from dspark.model_folder import fingerprint_weights, sampling_defaults
from dspark.registry import LoadedTarget, LoadOptions

__all__ = ["LOADER", "V4Loader"]

_CHECKED_ENTRIES = 8
"""Entries that the indexer keeps during the second check of exact mode, of some 30."""

_CHECKED_TOKENS = 125
"""Tokens of that check's context: it, too, ends just under a boundary that its tree crosses."""

logger = logging.getLogger(__name__)


class V4Loader:
    """Loader (dspark.registry) for model_type deepseek_v4, in either checkpoint layout."""

    priority = 10

    def handles(self, config: Mapping[str, Any]) -> bool:
        """True for DeepSeek-V4."""
        return config.get("model_type") == "deepseek_v4"

    def load(self, folder: Path, options: LoadOptions) -> LoadedTarget:
        """Load a V4 checkpoint.

        Raises:
            CheckpointError: If tensors are missing, superfluous or mis-shaped.
            ConfigError: If the config contradicts itself, or the expert memory is too small.
            CapabilityError: If exact mode was asked for and does not hold here, or kernels for the
                experts (`path="fused"`) that cannot be had.
        """
        checkpoint = Checkpoint.open(folder)
        checkpoint.check()
        devices = [pick_device(name.strip()) for name in options.device.split(",")]
        dtype = pick_dtype(options.dtype, devices[0])
        codec = load_v4_codec(folder)
        eos = (checkpoint.config.eos_token_id, *(codec.eos_token_ids if codec else ()))
        experts = open_experts(checkpoint, options.expert_memory)
        model = V4Model(checkpoint.config, checkpoint, experts, dtype=dtype, devices=devices)
        model.numerics.kernels = choose_kernels(checkpoint, devices, dtype, options)
        eos_ids = tuple(dict.fromkeys(eos))
        target = V4Target(model, name=options.name, eos_token_ids=eos_ids)
        decide_exactness(target, options, fingerprint_weights(folder))
        # The release samples at temperature 1 with the whole law.
        sampling = {"temperature": 1.0, "top_p": 1.0, **sampling_defaults(folder)}
        return LoadedTarget(target=target, codec=codec, sampling=sampling, folder=folder)


LOADER = V4Loader()


def open_experts(checkpoint: Checkpoint, memory: int | None) -> ExpertStore:
    """The routed experts' weights: mapped, or read as they are wanted within `memory` bytes."""
    if memory is None:
        return ResidentExperts(checkpoint)
    return PagedExperts(checkpoint, memory)


def decide_exactness(target: V4Target, options: LoadOptions, fingerprint: str) -> None:
    """Find out whether exact mode holds and what it costs, and switch it on or off.

    Raises:
        CapabilityError: If it was asked for and does not hold.
    """
    holds, cost = False, None
    kernels = target.model.numerics.kernels
    if options.exact is not False:
        info = target.info
        if kernels is not None:
            fingerprint = f"{fingerprint} {kernels.fingerprint}"
        key = exactness.probe_key(
            asdict(target.model.config), info.dtype, info.device, f"v4 selection {fingerprint}"
        )
        folder = options.probe_folder
        record = exactness.read_probe(folder, key) if folder is not None else None
        if record is None:
            logger.info("checking exact mode of %s on this machine (once)", options.name)
            target.switch_exact(True)
            holds = exactness.check_trees(target) and _check_selection(target)
            cost = exactness.measure_cost(target) if holds else None
            record = {"holds": holds, "cost": cost}
            if folder is not None:
                exactness.write_probe(folder, key, record)
        holds, cost = bool(record["holds"]), record["cost"]
    if options.exact and not holds:
        raise CapabilityError(
            f"exact mode does not hold for {options.name} in {target.info.dtype} on this machine: "
            "its kernels give a row other bits in other company.",
            hint="leave out --exact, or try another --dtype",
        )
    report = exactness.report(
        wanted=options.exact,
        holds=holds,
        min_rows=target.min_rows,
        backend="torch" if kernels is None else "torch, experts in C++",
        cost=cost,
    )
    target.set_exactness(report if report.enabled else replace(report, min_rows=1))


def _check_selection(target: V4Target) -> bool:
    """Check trees again with an indexer that keeps few entries.

    As loaded it keeps every entry of so short a context, so its scores would never be compared.
    """
    with target.model.keeping(_CHECKED_ENTRIES):
        return exactness.check_trees(target, most=_CHECKED_TOKENS)
