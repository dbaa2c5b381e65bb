"""Load a transformers model as a Target: adapter, dtype, device, kernels, probe."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as hf_logging

from dspark import exactness
from dspark.adapters.base import FamilyAdapter
from dspark.adapters.fused.choose import choose_target
from dspark.adapters.fused.drafts import pack_draft
from dspark.adapters.hf import exact, experts
from dspark.adapters.hf.attention import (
    ATTENTION_NAME,
    MAX_EXACT_NODES,
    attention_forward,
    no_mask,
)
from dspark.adapters.hf.linear import (
    RowWindow,
    available_kernels,
    find_windows,
    linear_shapes,
)
from dspark.adapters.hf.target import HFTarget
from dspark.adapters.quantise import quantise_modules
from dspark.devices import pick_device, pick_dtype
from dspark.errors import CapabilityError, CheckpointError
from dspark.installed import entry_points
from dspark.model_folder import fingerprint_weights, generation_config, sampling_defaults
from dspark.registry import LoadedTarget, LoadOptions
from dspark.text import load_codec

__all__ = ["LOADER", "TransformersLoader", "refuse_model", "wrap_model"]

logger = logging.getLogger(__name__)

# Rotary types whose frequencies follow the longest position in the batch: one request's text would
# depend on its neighbours.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, no_mask)


class TransformersLoader:
    """Loader (dspark.registry) for every family that has an adapter."""

    priority = 0
    can_quantise = True

    def handles(self, config: Mapping[str, Any]) -> bool:
        """True for every config that names a model type; unknown ones are refused by `load`."""
        return "model_type" in config

    def load(self, folder: Path, options: LoadOptions) -> LoadedTarget:
        """Load a model folder.

        Raises:
            CheckpointError: If the folder's files cannot be read, or tensors are missing.
            CapabilityError: If the family is unknown or cannot be tree-verified.
            ConfigError: If `path` is unknown.
        """
        try:
            config = _config(folder)
        except CheckpointError:
            adapter_for(_model_type(folder))  # an unknown family gets its own, clearer refusal
            raise
        adapter = adapter_for(config.model_type)
        refuse_model(config, adapter, options.name)
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        for name, value in adapter.config_overrides.items():
            setattr(config, name, value)
        model = _load_weights(folder, config, dtype, device, attention=ATTENTION_NAME)
        codec = load_codec(folder)
        generation = generation_config(folder)
        eos = _eos_ids(config, generation, codec.eos_token_ids if codec else ())
        weights = fingerprint_weights(folder)
        if options.quant != "none":
            weights = f"{weights} {options.quant}"

        def plain() -> HFTarget:
            return wrap_model(model, adapter, options, eos_token_ids=eos, fingerprint=weights)

        target = choose_target(
            model, adapter, options, plain, eos_token_ids=eos, fingerprint=weights
        )
        sampling = sampling_defaults(folder)
        return LoadedTarget(target=target, codec=codec, sampling=sampling, folder=folder)

    def pack_draft(self, module: object, draft_quant: str, path: str) -> str:
        """Put a draft module on packed weights; see `dspark.registry.pack_draft`."""
        return pack_draft(module, draft_quant, path)


LOADER = TransformersLoader()


def wrap_model(
    model: Any,
    adapter: FamilyAdapter,
    options: LoadOptions,
    *,
    eos_token_ids: tuple[int, ...] = (),
    fingerprint: str = "",
) -> HFTarget:
    """Wrap a loaded transformers model; its linear layers are replaced in place.

    Args:
        model: A causal LM.
        adapter: Its family.
        options: Name, exact mode and the folder for the probe's findings.
        eos_token_ids: Tokens that end a text.
        fingerprint: What tells these weights from others of the same config.

    Raises:
        CapabilityError: If exact mode was asked for and does not hold on this machine.
    """
    model.eval().requires_grad_(False)
    if options.quant != "none":
        quantise_modules(model, options.quant)
    model.set_attn_implementation(ATTENTION_NAME)
    experts.use_row_stable_experts(model)
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, parameter.device
    shapes = sorted({*linear_shapes(model), *experts.expert_shapes(model)})
    kernels = available_kernels(dtype, device)
    key = exactness.probe_key(
        model.config.to_dict(), str(dtype), str(device), f"{fingerprint} {kernels}"
    )
    folder = options.probe_folder
    record = exactness.read_probe(folder, key) if folder is not None else None
    # Packed weights are made for few rows; with hundreds torch's own product is the faster one.
    windows, kernel = None, "torch" if options.has_many_rows else kernels[0]
    if record is not None and options.exact is not False:
        kernel = record["kernel"]
        windows = {shape: RowWindow(*record["windows"][_shape_name(shape)]) for shape in shapes}
    elif options.exact is not False:
        for name in kernels:
            windows = find_windows(shapes, name, dtype, device)
            if windows is not None:
                kernel = name
                break
    experts.pack_experts(model, kernel, windows)
    target = HFTarget(
        model,
        adapter,
        name=options.name,
        kernel=kernel,
        windows=windows,
        eos_token_ids=eos_token_ids,
        quant=options.quant,
    )
    _decide(target, options, folder, key, record, windows)
    return target


def _shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _decide(
    target: HFTarget,
    options: LoadOptions,
    folder: Path | None,
    key: str,
    record: dict[str, Any] | None,
    windows: dict[tuple[int, int], RowWindow] | None,
) -> None:
    holds, cost = False, None
    if windows is not None:
        if record is None:
            logger.info("checking exact mode of %s on this machine (once)", options.name)
            rows = exact.find_query_rows(target)
            if rows is not None:
                target.query_rows = rows
                holds = exactness.check_trees(target)
            cost = exactness.measure_cost(target) if holds else None
            record = {
                "kernel": target.kernel,
                "windows": {_shape_name(s): [w.least, w.most] for s, w in windows.items()},
                "query_rows": target.query_rows,
                "holds": holds,
                "cost": cost,
            }
            if folder is not None:
                exactness.write_probe(folder, key, record)
        target.query_rows = int(record["query_rows"])
        holds, cost = bool(record["holds"]), record["cost"]
    if options.exact and not holds:
        raise CapabilityError(
            f"exact mode does not hold for {options.name} in {target.info.dtype} on this machine: "
            "its kernels give a row other bits in other company.",
            hint="leave out --exact, or try another --dtype",
        )
    target.set_exactness(
        exactness.report(
            wanted=options.exact,
            holds=holds,
            min_rows=target.min_rows,
            backend=target.kernel,
            cost=cost,
            max_nodes=MAX_EXACT_NODES,
        )
    )


def adapters() -> dict[str, FamilyAdapter]:
    """Installed adapters by model type."""
    found: dict[str, FamilyAdapter] = {}
    for point in entry_points(group="dspark.adapters"):
        adapter = point.load()
        found.update(dict.fromkeys(adapter.model_types, adapter))
    return found


def adapter_for(model_type: str) -> FamilyAdapter:
    """The adapter for a model type.

    Raises:
        CapabilityError: If there is none.
    """
    known = adapters()
    if model_type not in known:
        raise CapabilityError(
            f"models of type {model_type!r} cannot be tree-verified here; types that can: "
            f"{', '.join(sorted(known))}.",
            hint="an adapter can be added by entry point: docs/adapters.md",
        )
    return known[model_type]


def refuse_model(config: Any, adapter: FamilyAdapter, name: str) -> None:
    """Refuse a model that an adapter cannot run with the promises of this package.

    Args:
        config: The model's.
        adapter: Of its family.
        name: For the message.

    Raises:
        CapabilityError: If it is one.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    strange = sorted(kinds - {"full_attention", "sliding_attention", "attention"})
    reason = adapter.check(text)
    if strange:
        reason = f"it has {', '.join(strange)} layers, whose state cannot be rolled back"
    rope = getattr(text, "rope_parameters", None) or {}
    kinds_of_rope = {str(rope.get("rope_type", "default"))} | {
        str(part.get("rope_type")) for part in rope.values() if isinstance(part, dict)
    }
    if kinds_of_rope & set(_BATCH_DEPENDENT_ROPE):
        reason = "its rotary embedding depends on the longest request of a batch"
    if reason is not None:
        raise CapabilityError(f"{name} cannot be tree-verified: {reason}.")


def _model_type(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type"))


def load_stock_model(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, tuple[int, ...]]:
    """A model as transformers itself runs it, and the tokens that end its texts.

    Raises:
        CheckpointError: If transformers cannot read it.
    """
    config = _config(folder)
    model = _load_weights(folder, config, dtype, device, attention=None)
    return model, _eos_ids(config, generation_config(folder), ())


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as exc:
        raise CheckpointError(f"the config in {folder} cannot be used: {exc}") from exc


def _load_weights(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str | None,
) -> Any:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as exc:
        raise CheckpointError(f"the weights in {folder} are damaged: {exc}") from exc
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {first}") from exc
    finally:
        hf_logging.set_verbosity(level)
    model, info = loaded
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(str(item[0]) for item in info.get("mismatched_keys") or [])
    if missing or mismatched:
        kind, names = ("no", missing) if missing else ("a mis-shaped", mismatched)
        more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
        raise CheckpointError(
            f"the checkpoint in {folder} has {kind} tensor {', '.join(names[:3])}{more}."
        )
    return model.to(device)


def _eos_ids(
    config: Any, generation: Mapping[str, Any], tokenizer_eos: tuple[int, ...]
) -> tuple[int, ...]:
    found: list[int] = []
    for value in (generation.get("eos_token_id"), getattr(config, "eos_token_id", None)):
        if value is not None:
            found.extend(value if isinstance(value, list | tuple) else [value])
    return tuple(dict.fromkeys(int(i) for i in (*found, *tokenizer_eos)))
