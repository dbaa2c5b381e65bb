"""The programs that a draft can be written for."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ENGINES", "Program"]


class Program(StrEnum):
    """Who will read the draft."""

    VLLM = "vllm"
    SGLANG = "sglang"
    SPECULATORS = "speculators"
    DEEPSPEC = "deepspec"
    SPECFORGE = "specforge"
    DSPARK = "dspark"


ENGINES = (Program.VLLM, Program.SGLANG)
"""Those that serve."""
