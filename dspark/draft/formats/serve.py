"""The command that serves a target with a draft in vLLM or SGLang, and what to know about it.

The script stands beside the draft and finds it there, so the folder can be moved; further arguments
are handed on to the server.

**Source:** vLLM 0.33 `config/speculative.py`; SGLang 0.5.23 `server_args.py` and the DSpark hooks.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.eagle3_module import Eagle3Config
from dspark.draft.formats.programs import Program
from dspark.draft.formats.write_eagle3 import DRAFTED

__all__ = ["SCRIPT", "engine_notes", "readme", "serve_script"]

SCRIPT = "serve.sh"
_FOLDER = "@FOLDER@"  # the folder's place in JSON, before the shell fills it in


def serve_script(
    config: DSparkConfig | Eagle3Config, to: Program, target: str | None, sts: str | None
) -> str:
    """A shell script that starts a server.

    Args:
        config: The draft's.
        to: vllm or sglang.
        target: Name of the target; None makes the script ask for it.
        sts: File of SGLang's temperatures beside the draft, None for none.
    """
    lines = ["#!/bin/sh", 'draft=$(cd "$(dirname "$0")" && pwd) || exit 1']
    if target is None:
        lines.append("target=${TARGET:?set TARGET to the model that the draft was made for}")
    else:
        lines += [f"name={shlex.quote(target)}", "target=${TARGET:-$name}"]
    command = _vllm(config) if to is Program.VLLM else _sglang(config, sts)
    lines.append("exec " + " \\\n  ".join([*command, '"$@"']))
    return "\n".join(lines) + "\n"


def _vllm(config: DSparkConfig | Eagle3Config) -> list[str]:
    settings = {
        "method": _method(config),
        "model": _FOLDER,
        "num_speculative_tokens": _drafted(config),
    }
    quoted = shlex.quote(json.dumps(settings)).replace(_FOLDER, "'\"$draft\"'")
    return ['vllm serve "$target"', f"--speculative-config {quoted}"]


def _sglang(config: DSparkConfig | Eagle3Config, sts: str | None) -> list[str]:
    count = _drafted(config)
    lines = [
        'python3 -m sglang.launch_server --model-path "$target"',
        f"--speculative-algorithm {_method(config).upper()}",
        '--speculative-draft-model-path "$draft"',
    ]
    if isinstance(config, Eagle3Config):
        lines.append(f"--speculative-num-steps {count} --speculative-eagle-topk 1")
    else:
        size = count if config.markov_rank else config.block_size
        lines.append(f"--speculative-{_method(config)}-block-size {size}")
    lines.append(f"--speculative-num-draft-tokens {count + 1}")
    if sts is not None:
        lines.append(f'--speculative-dspark-confidence-sts-path "$draft/{sts}"')
    return lines


def _method(config: DSparkConfig | Eagle3Config) -> str:
    if isinstance(config, Eagle3Config):
        return "eagle3"
    return "dspark" if config.markov_rank else "dflash"


def _drafted(config: DSparkConfig | Eagle3Config) -> int:
    return DRAFTED if isinstance(config, Eagle3Config) else config.gamma


def engine_notes(config: DSparkConfig | Eagle3Config, to: Program) -> list[str]:
    """Sentences about what an engine does with a draft, and does not."""
    notes = ["it drafts chains; trees are dspark's."]
    if isinstance(config, Eagle3Config):
        notes.append(f"{DRAFTED} tokens are drafted a round; any number can be.")
    else:
        notes.append(f"the block has its trained length, {config.gamma} tokens; keep it.")
    if to is Program.VLLM:
        notes.append(
            "at temperatures above 0 it takes the likeliest token of the draft; "
            '"draft_sample_method": "probabilistic" samples, as the draft was trained to.'
        )
    if not isinstance(config, DSparkConfig) or not config.markov_rank:
        return notes
    notes.append(_confidence_note(config, to))
    return notes


def _confidence_note(config: DSparkConfig, to: Program) -> str:
    switch = (
        '"enable_adaptive_verification": true'
        if to is Program.VLLM
        else "SGLANG_RAGGED_VERIFY_MODE=cap-accept or compact"
    )
    if config.enable_confidence_head:
        return f"the confidence head is used with {switch} only."
    return f"it has no confidence head, so {switch} is not for it."


def readme(title: str, rows: Sequence[tuple[str, str]], notes: Sequence[str], body: str) -> str:
    """A README.md: a title, a table, notes, and indented text."""
    lines = [f"# {title}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if body:
        lines += ["", *(f"    {line}" if line else "" for line in body.splitlines())]
    return "\n".join(lines) + "\n"
