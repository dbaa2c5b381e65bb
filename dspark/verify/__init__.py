"""Verification: shaping logits into laws, noise, acceptance rules, the batched verifier."""
