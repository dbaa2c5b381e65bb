"""What happens to a call that cannot be kept: the model's own generate runs, with one warning."""

from __future__ import annotations

import warnings

__all__ = ["FallbackWarning", "Refusal", "warn_once"]


class FallbackWarning(UserWarning):
    """A call, or a model, that transformers' own generate runs after all."""


class Refusal(Exception):  # noqa: N818 - no error: it sends a call to transformers' own generate
    """A call that dspark does not run.

    Args:
        reason: What stands in the way, to be read behind "because of".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def warn_once(seen: set[str], reason: str) -> None:
    """Warn that a call falls back, unless the same was said before.

    Args:
        seen: Reasons that were given already; this one is added.
        reason: As in `Refusal`.
    """
    if reason not in seen:
        seen.add(reason)
        warnings.warn(
            f"dspark leaves this call to the model's own generate because of {reason}",
            FallbackWarning,
            stacklevel=3,
        )
