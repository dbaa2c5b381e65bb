"""A toy server shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.toys import Running, serving, toy_engine


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    """A server with the toy engine and default limits."""
    with serving(toy_engine()) as running:
        yield running
