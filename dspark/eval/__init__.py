"""Measuring: acceptance, losslessness, and what reports of both are made of."""
