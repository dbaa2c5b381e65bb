"""Drafters of dspark inside other engines, by their public plug points.

Each module imports without its engine, and the engine is never changed: what is handed over is
an object of the shape that it asks for. What each engine guarantees, and which versions were read,
is in docs/plugins.md.
"""
