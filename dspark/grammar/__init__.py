"""Grammars: what a text must conform to, token by token (docs/structured.md).

Importing this costs nothing: llguidance is loaded when the first grammar is made.
"""

from __future__ import annotations

from dspark.grammar.grammar import Grammar, Whitespace

__all__ = ["Grammar", "Whitespace"]
