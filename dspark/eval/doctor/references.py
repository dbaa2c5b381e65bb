"""Published accepted lengths of released drafts, and which of them a draft should reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dspark.eval.doctor.patient import Patient

__all__ = ["Reference", "find_reference", "load_references"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a draft reached elsewhere.

    Attributes:
        name: Of the draft (the end of its hub id), or of the target whose own draft it is.
        config: Fields of its config.json that identify it; None where only the name does.
        tau: Committed tokens per round by data set, closing token included.
        conditions: How that was measured.
        source: Where it stands.
    """

    name: str
    config: Mapping[str, Any] | None
    tau: Mapping[str, float]
    conditions: str
    source: str

    @property
    def lowest(self) -> float:
        """Tau on the hardest data set: what any prompts should about reach."""
        return min(self.tau.values())

    def matches(self, patient: Patient) -> bool:
        """Whether this is the draft's: by name, else by its config's fields."""
        names = (patient.name, patient.spec, patient.target.info.name)
        if any(self.name in name.lower() for name in names):
            return True
        fields = self.config
        return fields is not None and all(
            patient.config.get(name) == value for name, value in fields.items()
        )


def load_references() -> tuple[Reference, ...]:
    """The references that ship with dspark (eval/data/references.json)."""
    path = resources.files("dspark.eval").joinpath("data/references.json")
    rows = json.loads(path.read_text("utf-8"))["references"]
    return tuple(Reference(**row) for row in rows)


def find_reference(patient: Patient) -> Reference | None:
    """What the draft should reach: its own model card's figure, else a published one.

    Returns:
        The reference, or None if there is none.
    """
    validation = patient.training.get("validation")
    if isinstance(validation, Mapping) and isinstance(validation.get("tau_greedy"), float):
        return Reference(
            name=patient.name,
            config=None,
            tau={"held-out answers": validation["tau_greedy"]},
            conditions="greedy, chains, estimated in training",
            source="its config.json",
        )
    if patient.trained is None:
        return None
    return next((own for own in load_references() if own.matches(patient)), None)
