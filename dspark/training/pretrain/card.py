"""The model card of a small V4: what it is, of what text, how it was made, with which figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspark.base_model.config import V4Config

__all__ = ["model_card"]

_LICENCE = """\
The weights are under the licence of this package (MIT). They were trained on the text above, whose
licences are named there; what they write is not that text."""


def model_card(
    config: V4Config,
    manifest: Mapping[str, Any],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Mapping[str, Mapping[str, float]],
) -> str:
    """README.md of a checkpoint.

    Args:
        config: Of the checkpoint.
        manifest: Of the text (`text.collect`).
        logs: Of every run: "target", and "dspark" or "mtp".
        losses: Held-out loss by kind of text: "trained", "packed".
    """
    kinds = ", ".join(
        f"{count} {name}"
        for name, count in (
            ("sliding window only", config.compress_ratios.count(0)),
            ("CSA", config.compress_ratios.count(4)),
            ("HCA", sum(m not in (0, 4) for m in config.compress_ratios)),
        )
    )
    draft = "DSpark" if config.is_dspark else "MTP-1" if config.draft_stages else "none"
    parts = [
        "# v4-mini",
        "A small DeepSeek-V4 trained from scratch on a CPU, to run and measure V4's path with "
        "trained weights. It continues Python and its documentation and answers in chat form; it "
        "knows little and is often wrong.",
        "## Model",
        f"{config.num_hidden_layers} layers ({kinds}), hidden size {config.hidden_size}, "
        f"{config.n_routed_experts} experts of which {config.num_experts_per_tok} and a shared one "
        f"are used, {config.vocab_size} tokens of its own; FP4 experts, FP8 linears, as V4's "
        f"releases. Own draft: {draft}.",
        "## Text",
        _text_lines(manifest),
        "## Training",
        "\n".join(_run_line(name, log) for name, log in logs.items()),
        "See docs/v4-mini.md for the commands; the recipe is recipes/v4-mini.toml.",
        "## Figures",
        _loss_table(losses),
        *(_acceptance_lines(name, log) for name, log in logs.items() if name != "target"),
        "## Licence",
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text_lines(manifest: Mapping[str, Any]) -> str:
    lines = [
        f"- {kind}: {manifest['bytes'][kind] / 1e6:.1f} MB. {licence}."
        for kind, licence in manifest["licences"].items()
    ]
    lines += [f"- {name}: {value}" for name, value in manifest["notes"].items()]
    share = f"{100 * manifest['holdout']:.0f} %"
    lines.append(f"- Python {manifest['python']}; {share} of the documents are held out")
    lines.append(f"- SHA-256 of the documents: {manifest['sha256']}")
    return "\n".join(lines)


def _run_line(name: str, log: Sequence[Mapping[str, Any]]) -> str:
    last = log[-1]
    seconds = sum(_size(log, i) / row["tokens_per_second"] for i, row in enumerate(log))
    threads = " or ".join(str(count) for count in sorted({row["threads"] for row in log}))
    return (
        f"- {name}: {last['step']} steps, {last['tokens'] / 1e6:.1f} M tokens, "
        f"{seconds / 3600:.1f} hours of {threads} CPU thread{'' if threads == '1' else 's'}"
    )


def _size(log: Sequence[Mapping[str, Any]], index: int) -> int:
    """Tokens of a step."""
    before = log[index - 1]["tokens"] if index else 0
    size: int = log[index]["tokens"] - before
    return size


def _loss_table(losses: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(next(iter(losses.values())))
    lines = [
        "Held-out loss in nats a token:",
        "",
        "| weights | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name, values in losses.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[kind]:.3f}" for kind in kinds) + " |")
    return "\n".join(lines)


def _acceptance_lines(name: str, log: Sequence[Mapping[str, Any]]) -> str:
    found = [row["held_out"] for row in log if "held_out" in row]
    if not found:
        return ""
    lines = [
        f"Held-out acceptance of {name} at depth 1, 2, ..., given the text's own tokens before "
        "(temperature 1):",
        "",
    ]
    for kind, values in found[-1].items():
        lines.append(f"- {kind}: " + " ".join(f"{value:.3f}" for value in values))
    return "\n".join(lines)
