"""A fast path for wrapped targets on the CPU: one generic decoder, one call."""
