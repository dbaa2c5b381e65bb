"""The draft folder that a run leaves: weights, facts, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark.training.kinds import DraftFacts
from dspark.training.metrics import Figures
from dspark.training.setup import Setup

__all__ = ["publish"]


def publish(
    folder: Path,
    setup: Setup,
    weights: Mapping[str, Tensor],
    *,
    step: int,
    epoch: float,
    figures: Figures | None,
) -> None:
    """Write the draft as it is now.

    Args:
        folder: Where to.
        setup: The run's.
        weights: The module's state dict.
        step: Steps done.
        epoch: Epochs done.
        figures: Of the validation at this step, None without one.
    """
    recipe = setup.recipe
    training = {
        "steps": step,
        "epochs": round(epoch, 4),
        "samples": len(setup.samples.train),
        "held_out": len(setup.samples.validation),
        "response_tokens": sum(s.length - s.start for s in setup.samples.train),
        "data_sha256": setup.samples.sha256,
        "template_sha256": setup.template,
        "recipe": _without_paths(recipe.to_json()),
        "validation": None if figures is None else asdict(figures),
    }
    target = {**setup.described, "dtype": setup.target.info.dtype}
    facts = DraftFacts(target=target, training=training, card=_card(setup, training, figures))
    setup.draft.save(folder, weights, recipe.draft.storage, facts)


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths of the machine it ran on."""
    values["data"]["shards"] = [Path(shard).name for shard in values["data"]["shards"]]
    values["run"]["cache"] = None
    start = values["draft"]["init_from_draft"]
    values["draft"]["init_from_draft"] = None if start is None else Path(start).name
    if "/" in values["target"] and Path(values["target"]).exists():
        values["target"] = Path(values["target"]).name
    return values


def _card(setup: Setup, training: Mapping[str, Any], figures: Figures | None) -> str:
    draft, name, loss = setup.draft, setup.described["id"], setup.recipe.loss
    terms = [f"{loss.ce} CE" + (" with the target's law" if loss.labels == "target" else "")]
    terms.append(f"{loss.l1} L1")
    if draft.has_confidence:
        terms.append(f"{loss.confidence} confidence")
    quant = setup.target.info.quant
    rounded = "" if quant == "none" else f", rounded to {quant} while it was learnt from"
    lines = [
        f"# A draft for {name}: {draft.title}",
        "",
        f"Trained to draft up to {draft.shape.gamma} tokens a round for {name}, which verifies",
        "them; the text is the target's own. Use it with the target it was trained for:",
        "",
        f"    dspark generate PROMPT --target {name} --draft FOLDER",
        "",
        "| | |",
        "|---|---|",
        f"| target | {name}, fingerprint {str(setup.described.get('fingerprint'))[:16]}{rounded} |",
        *(f"| {key} | {value} |" for key, value in draft.settings()),
        f"| trained on | {training['samples']} answers of the target, "
        f"{training['response_tokens']} tokens |",
        f"| trained for | {training['steps']} steps, {training['epochs']:.2f} epochs |",
        f"| loss | {' + '.join(terms)} |",
    ]
    if figures is not None:
        lines += ["", *_validation_lines(figures, training["held_out"])]
    return "\n".join(lines) + "\n"


def _validation_lines(figures: Figures, held_out: int) -> list[str]:
    def percent(values: tuple[float, ...]) -> str:
        return " | ".join(f"{100 * value:.1f} %" for value in values)

    depths = range(1, len(figures.acceptance) + 1)
    return [
        f"On held-out answers ({held_out} set aside), with the text's own tokens before each",
        "position; chains, closing token included:",
        "",
        f"- estimated tau, greedy: {figures.tau_greedy:.2f}",
        f"- estimated tau, sampling at temperature 1: {figures.tau_sampling:.2f}",
        "",
        "| depth | " + " | ".join(map(str, depths)) + " |",
        "|---|" + "---|" * len(figures.acceptance),
        f"| acceptance 1 - TV | {percent(figures.acceptance)} |",
        f"| greedy agreement | {percent(figures.agreement)} |",
        f"| the same, if all before agree | {percent(figures.conditional)} |",
    ]
