"""K/V of the context in a draft's own layers, one `ContextCache` a request.

Rows are kept by position in buffers that grow by doubling, so that a round writes only what is new,
and the block's own K/V lie behind the context just for the forward. A sliding layer forgets what
its window has passed whenever its buffer is moved.

Letters: H key/value heads, E head size, C capacity, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["ContextCache", "common_length"]

_LEAST = 64  # rows of a new buffer; larger ones have a multiple, which fills vectors


class _Layer:
    """Rows of one layer: positions first .. stop - 1 are kept."""

    __slots__ = ("first", "key", "stop", "value", "window")

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.first = 0
        self.stop = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def restart(self, position: int) -> None:
        """Forget everything; the next row is at `position`."""
        self.first = self.stop = position

    def can_lend(self, stop: int) -> bool:
        """Whether all rows are here that positions from `stop` on see of those before it."""
        return self.first <= (0 if self.window is None else max(0, stop - self.window))

    def write(self, key: Tensor, value: Tensor) -> None:
        """Put rows [n, H, E] behind the kept ones, without keeping them yet."""
        rows, heads, size = key.shape
        keys, values = self.room(rows, (heads, size), key)
        used = self.stop - self.first
        keys[:, used : used + rows] = key.transpose(0, 1)
        values[:, used : used + rows] = value.transpose(0, 1)

    def room(self, rows: int, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers [H, C, E] in which so many rows fit behind the kept ones."""
        if self.key is None or self.value is None:
            return self._move(rows, shape, like)
        if self.stop - self.first + rows > self.key.shape[1]:
            return self._move(rows, shape, like)
        return self.key, self.value

    def _move(self, rows: int, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first
        if self.window is not None:
            first = max(first, self.stop - self.window)
        kept = self.stop - first
        capacity = -(-(2 * kept + rows) // _LEAST) * _LEAST
        heads, size = shape
        key, value = like.new_empty(heads, capacity, size), like.new_empty(heads, capacity, size)
        if kept and self.key is not None and self.value is not None:
            start = first - self.first
            key[:, :kept] = self.key[:, start : start + kept]
            value[:, :kept] = self.value[:, start : start + kept]
        self.first, self.key, self.value = first, key, value
        return key, value

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views [H, n, E] of positions start .. stop - 1, written rows included."""
        if self.key is None or self.value is None:
            raise RuntimeError("a draft cache was read before it was written")
        part = slice(start - self.first, stop - self.first)
        return self.key[:, part], self.value[:, part]


class ContextCache:
    """What a draft keeps of one request's context.

    Args:
        windows: Size of each layer's window, None for none.

    Attributes:
        tokens: Tokens of positions 0 .. length - 1.
    """

    __slots__ = ("_layers", "tokens")

    def __init__(self, windows: Sequence[int | None]) -> None:
        self._layers = [_Layer(window) for window in windows]
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Positions taken in, from the beginning of the text."""
        return len(self.tokens)

    def can_lend(self, stop: int) -> bool:
        """Whether a text that goes on behind position `stop` - 1 would find all rows it sees."""
        return stop <= self.length and all(layer.can_lend(stop) for layer in self._layers)

    @property
    def kept(self) -> int:
        """Positions whose rows the first layer keeps, the last ones."""
        return self._layers[0].stop - self._layers[0].first

    def room(self, rows: int, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers of the first layer, to be written to by whoever `advance`s.

        Args:
            rows: Rows to come.
            shape: (H, E).
            like: A tensor of the dtype and device wanted.

        Returns:
            Keys and values [H, C, E]; the next row belongs at index `kept`.
        """
        return self._layers[0].room(rows, shape, like)

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in new positions whose rows were written into `room`."""
        for layer in self._layers:
            layer.stop += len(tokens)
        self.tokens.extend(tokens)

    def append(self, tokens: Sequence[int], rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in new positions.

        Args:
            tokens: Their tokens, n.
            rows: Keys and values [n, H, E] of every layer.
        """
        for layer, (key, value) in zip(self._layers, rows, strict=True):
            layer.write(key, value)
        self.advance(tokens)

    def with_block(
        self, layer: int, key: Tensor, value: Tensor, reach: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Context and block of one layer for the time of a forward.

        Args:
            layer: Index of the layer.
            key: Keys of the block, [n, H, E].
            value: Values of the block.
            reach: Context positions wanted, the newest ones; None for all.

        Returns:
            (keys [H, c + n, E], values, c): c context rows, then the block; views.
        """
        held = self._layers[layer]
        held.write(key, value)
        start = held.first if reach is None else max(held.first, held.stop - reach)
        keys, values = held.rows(start, held.stop + key.shape[0])
        return keys, values, held.stop - start

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        for layer in self._layers:
            layer.stop = min(layer.stop, length)
            if layer.stop < layer.first:
                layer.restart(length)
        del self.tokens[length:]

    def skip(self, tokens: Sequence[int]) -> None:
        """Go on behind positions whose hidden states nobody has; what lies before is lost too."""
        self.tokens.extend(tokens)
        for layer in self._layers:
            layer.restart(self.length)

    def borrow(self, donor: ContextCache, stop: int) -> None:
        """Copy positions length .. stop - 1 from a request whose text starts alike."""
        start = self.length
        for mine, theirs in zip(self._layers, donor._layers, strict=True):
            begin = max(start, theirs.first)
            if begin > start:
                mine.restart(begin)
            if begin < stop:
                key, value = theirs.rows(begin, stop)
                mine.write(key.transpose(0, 1), value.transpose(0, 1))
                mine.stop = stop
            else:
                mine.restart(stop)
        self.tokens.extend(donor.tokens[start:stop])


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts have in common at the beginning."""
    limit = min(len(one), len(other))
    if list(one[:limit]) == list(other[:limit]):
        return limit
    low, high = 0, limit  # equal up to low, different within high
    while low + 1 < high:
        middle = (low + high) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle
    return low
