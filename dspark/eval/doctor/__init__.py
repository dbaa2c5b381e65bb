"""Doctor: checks a target, its draft and the machine, and names causes (docs/doctor.md)."""
