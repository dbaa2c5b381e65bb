"""The errors dspark raises, drawn as a tree.

    DsparkError
    ├── ConfigError       a setting or argument is out of range or contradicts another
    ├── CheckpointError   weights, a tokenizer or a config cannot be found, read or trusted
    ├── ShapeError        tensors that must agree in shape do not
    ├── CapabilityError   this target, cache or drafter cannot do what was asked
    └── DataError         a prompt or data file cannot be used

Every error has a `message` (one sentence: what was wrong, which value, what is allowed) and an
optional `hint` (one line: what to do). The command line prints both and exits with status 2.
"""

from __future__ import annotations

__all__ = [
    "CapabilityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DsparkError",
    "ShapeError",
]


class DsparkError(Exception):
    """Any error that the caller, not dspark, can mend.

    Attributes:
        message: One sentence: what was wrong, which value, what is allowed.
        hint: One line that says what to do next, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(DsparkError):
    """A setting or argument is out of range, or two of them contradict each other."""


class CheckpointError(DsparkError):
    """Weights, a tokenizer or a model config cannot be found, read or trusted."""


class ShapeError(DsparkError):
    """Tensors that must agree in shape do not."""


class CapabilityError(DsparkError):
    """This target, cache or drafter cannot do what was asked of it."""


class DataError(DsparkError):
    """A prompt or a data file cannot be used."""
