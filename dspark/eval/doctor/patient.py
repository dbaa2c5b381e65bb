"""The pair that is looked at: the drafter, and what its files say about it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspark.draft.base import Drafter
from dspark.draft.combined import CombinedDrafter
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.formats.detect import is_draft, load_module
from dspark.draft.formats.fields import read_config
from dspark.draft.none import NoDrafter
from dspark.engine import Engine
from dspark.errors import CheckpointError, DsparkError
from dspark.eval.runner import load_drafts
from dspark.target import Target
from dspark.text import TextCodec

__all__ = ["Patient", "load_patient"]

_NATIVE = "dspark_draft"  # where dspark's own layout keeps its fields


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patient:
    """A target, a draft and what is known of them.

    Attributes:
        target: The target.
        drafter: The draft as it would be used; None if there is none, or it could not be loaded.
        codec: The target's text codec, or None.
        spec: The draft as the user named it.
        trained: The trained part of the draft: the drafter itself, or the part beside lookup; None
            where nothing of it was trained for this target.
        module: Its network, if it is a DSpark or DFlash module from a folder.
        config: Its config.json; empty without one.
        folder: Where its files are, or None.
        refusal: Why it could not be loaded, or None.
    """

    target: Target
    drafter: Drafter | None
    codec: TextCodec | None = None
    spec: str = ""
    trained: Drafter | None = None
    module: DSparkModule | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    refusal: DsparkError | None = None

    @property
    def native(self) -> Mapping[str, Any]:
        """What dspark's own layout says; empty for others."""
        found = self.config.get(_NATIVE)
        return found if isinstance(found, Mapping) else {}

    @property
    def training(self) -> Mapping[str, Any]:
        """How the draft was trained, as far as it says."""
        found = self.native.get("training")
        return found if isinstance(found, Mapping) else {}

    @property
    def trained_for(self) -> Mapping[str, Any]:
        """The target that it was trained for, as far as it says."""
        found = self.native.get("target")
        return found if isinstance(found, Mapping) else {}

    @property
    def gamma(self) -> int | None:
        """Tokens of a drafted path at the most; None where the draft sets no limit."""
        return None if self.module is None else self.module.config.gamma

    @property
    def name(self) -> str:
        """What findings call the draft."""
        return self.folder.name if self.folder is not None else self.spec

    def variant(self, **changes: Any) -> Drafter:
        """A drafter of the same weights with other settings of `DSparkConfig`.

        Raises:
            ConfigError: If the settings contradict each other.
        """
        if self.module is None:
            raise CheckpointError("only DSpark and DFlash modules have variants.")
        changed = copy.copy(self.module)  # the parameters are shared
        changed.config = dataclasses.replace(self.module.config, **changes)
        return DSparkDrafter(changed, name=self.name)

    def in_dtype(self, dtype: torch.dtype) -> Drafter:
        """A drafter of the same module in another dtype; takes memory for a second copy."""
        if self.module is None:
            raise CheckpointError("only DSpark and DFlash modules can be copied.")
        shares, self.module.shares = self.module.shares, None  # the target is not copied
        try:
            changed = copy.deepcopy(self.module)
        finally:
            self.module.shares = shares
        changed.shares, changed.head_rows = shares, None  # the target's rows are taken anew
        return DSparkDrafter(changed.to(dtype), name=self.name)

    def vocabulary(self) -> Tensor | None:
        """Target ids of the draft's vocabulary, int64 [Vd]; None if it has the target's."""
        if self.module is not None:
            return self.module.vocab.ids
        if self.folder is None:
            return None
        for name, tensor in _tensors(self.folder):
            if name == "d2t":
                return torch.arange(len(tensor)) + tensor.to(torch.int64)
        return None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained part's tensors, by name."""
        if self.module is not None:
            yield from self.module.state_dict().items()
        elif self.folder is not None and self.trained is not None:
            yield from _tensors(self.folder)

    @property
    def block(self) -> DSparkConfig | None:
        """Settings of a DSpark or DFlash module, else None."""
        return None if self.module is None else self.module.config


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{path} is not a whole safetensors file ({exc}).") from exc


def load_patient(engine: Engine, target: str, draft: str, *, dtype: str, device: str) -> Patient:
    """Load a draft beside a target that is loaded already.

    Args:
        engine: An engine of the target.
        target: The target as the user named it.
        draft: As --draft.
        dtype: As the target's.
        device: As the target's.

    Returns:
        The pair. A draft that is refused is no error here: `refusal` says why.
    """
    plain = Patient(target=engine.target, drafter=None, codec=engine.codec, spec=draft)
    try:
        head, plus, rest = draft.partition("+")
        if not plus or Path(draft).expanduser().exists():
            return _load_part(engine, plain, target, dtype=dtype, device=device)
        halves = [
            _load_part(
                engine, dataclasses.replace(plain, spec=half), target, dtype=dtype, device=device
            )
            for half in (head, rest)
        ]
        first, second = halves if not rest.startswith("lookup") else halves[::-1]
        if first.drafter is None or second.drafter is None:
            return plain
        known = next((half for half in halves if half.trained is not None), first)
        whole = CombinedDrafter(first.drafter, second.drafter)
        return dataclasses.replace(known, drafter=whole, spec=draft)
    except DsparkError as refusal:
        folder = _folder_of(draft)
        config = _config_of(folder)
        return dataclasses.replace(plain, refusal=refusal, folder=folder, config=config)


def _load_part(engine: Engine, plain: Patient, target: str, *, dtype: str, device: str) -> Patient:
    """A draft that is not combined."""
    folder = _folder_of(plain.spec)
    config = _config_of(folder)
    if folder is not None and _is_block(config):
        module = load_module(folder, engine.target)
        drafter: Drafter = DSparkDrafter(
            module, name="dspark" if module.config.markov_rank else "dflash"
        )
        return dataclasses.replace(
            plain, drafter=drafter, trained=drafter, module=module, config=config, folder=folder
        )
    loaded = load_drafts(engine, target, plain.spec, dtype=dtype, device=device).drafter
    if isinstance(loaded, NoDrafter):
        return plain
    is_trained = bool(loaded.capture) or (folder is not None and is_draft(config))
    return dataclasses.replace(
        plain, drafter=loaded, trained=loaded if is_trained else None, config=config, folder=folder
    )


def _is_block(config: Mapping[str, Any]) -> bool:
    from dspark.draft.eagle3 import is_eagle3

    return is_draft(config) and not is_eagle3(config)


def _folder_of(spec: str) -> Path | None:
    """The folder of a draft that has one."""
    from dspark.models.resolve import resolve_model

    if spec in ("auto", "none") or spec.split(":")[0] == "lookup" or "+" in spec:
        return None
    try:
        return resolve_model(spec, progress=False)
    except DsparkError:
        path = Path(spec).expanduser()
        return path if path.is_dir() else None


def _config_of(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        return dict(read_config(folder))
    except (DsparkError, json.JSONDecodeError):
        return {}
