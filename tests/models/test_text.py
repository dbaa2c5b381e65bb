from __future__ import annotations

import pytest

from dspark.errors import ConfigError
from dspark.models.text import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32GiB", 32 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("4096", 4096),
        ("12k", 12_000),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "3iB", "1e9", "5 XB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is no size; give a number and a unit"):
        parse_bytes(text)
