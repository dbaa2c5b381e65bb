"""Compile the C++ that tests run, as a part of setting up: the first tests would wait for it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dspark import native
from dspark.adapters.fused.layout import NotFused
from dspark.adapters.fused.library import load_library
from dspark.base_model.native_experts import load_kernels
from dspark.draft import native_lookup
from dspark.folders import cache_root
from dspark.verify import noise_native


def main() -> None:
    """Compile each library that this machine does not have yet."""
    folder = cache_root() / "kernels"
    libraries: dict[str, Callable[[], object]] = {
        "decoder": lambda: load_library(folder),
        "experts": lambda: load_kernels(folder),
        "lookup": native_lookup.load_library,
        "noise": noise_native.load_library,
    }
    for name, load in libraries.items():
        try:
            load()
        except (NotFused, native.NotCompiled) as exc:  # the tests skip what needs them
            sys.stdout.write(f"{name}: {exc}\n")
        else:
            sys.stdout.write(f"{name}: compiled\n")


if __name__ == "__main__":
    main()
