"""Shared machinery of targets that wrap transformers models."""
