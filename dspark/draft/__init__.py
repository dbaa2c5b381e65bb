"""Drafters: from a context to a tree of candidate tokens."""
