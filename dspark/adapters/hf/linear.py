"""Linear layers whose result for a row does not depend on the rows that ride along.

A matrix product is free to sum in another order for another number of rows, which flips near-ties
between plain and speculative decoding. Here every linear layer runs with kernels and row counts for
which a probe at load found the results bitwise equal. Three kernels are known:

- mkl:     oneMKL with weights packed once (float32 on x86): fastest, all row counts agree.
- mkl-f32: the same for bfloat16 weights, multiplied in float32 and rounded at the end: for CPUs
           without bfloat16 instructions, whose emulation neither agrees nor is fast.
- onednn:  oneDNN with weights packed once (float32, bfloat16).
- torch:   torch's own linear; the agreeing row counts depend on machine, shape and threads.

Packing also makes a verify batch cheap: one row and sixteen cost nearly the same, where torch's own
float32 product takes several times as long (benchmarks/linear.py).
Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark.devices import has_native_bfloat16

__all__ = [
    "KERNELS",
    "RowStableLinear",
    "RowWindow",
    "available_kernels",
    "find_row_window",
    "replace_linears",
]

Product = Callable[[Tensor], Tensor]

_PACK_ROWS = 16
"""Row count that packed layouts are made for: a typical verify batch."""

_PROBE_ROWS = (*range(1, 18), 24, 31, 32, 33, 48, 64, 100, 128, 256)


@dataclass(frozen=True, slots=True)
class RowWindow:
    """Row counts over which a product's rows agree bitwise.

    Attributes:
        least: Fewest rows to run with.
        most: Most rows to run with at once.
    """

    least: int
    most: int


def _torch_product(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: nn.functional.linear(x, weight, bias)


def _onednn_product(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")


def _mkl_product(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    run = torch.ops.mkl._mkl_linear
    # The operator reads only the shape of the unpacked weight, so that copy need not stay.
    shape = torch.empty(1).expand(weight.shape)
    return lambda x: run(x, packed, shape, bias, x.shape[0])


def _mkl_upcast_product(weight: Tensor, bias: Tensor | None) -> Product:
    product = _mkl_product(weight.float(), None if bias is None else bias.float())
    return lambda x: product(x.float()).to(x.dtype)


KERNELS: dict[str, Callable[[Tensor, Tensor | None], Product]] = {
    "mkl": _mkl_product,
    "mkl-f32": _mkl_upcast_product,
    "onednn": _onednn_product,
    "torch": _torch_product,
}
"""Known kernels. The order of preference is fixed, not measured at load, so that the same machine
always computes the same bits."""


def _preferred(dtype: torch.dtype) -> list[str]:
    """Names of the kernels for a dtype on a CPU, the preferred first."""
    if dtype == torch.float32:
        return ["mkl", "onednn", "torch"]
    if dtype == torch.bfloat16 and has_native_bfloat16():
        return ["onednn", "mkl-f32", "torch"]
    return ["mkl-f32", "onednn", "torch"]


def available_kernels(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels that run and give right results for this dtype and device, the preferred first.

    Args:
        dtype: Weight dtype.
        device: Weight device.

    Returns:
        Names of KERNELS; "torch" is always among them.
    """
    if device.type != "cpu":
        return ["torch"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator).to(dtype)
    rows = torch.randn(37, 80, generator=generator).to(dtype)
    expected = nn.functional.linear(rows.double(), weight.double())
    scale = expected.abs().max()
    names = []
    for name in _preferred(dtype):
        try:
            product = KERNELS[name](weight, None)
            errors = [(product(rows[:n]) - expected[:n]).abs().max() for n in (1, 2, 5, 16, 37)]
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # the operator does not exist in this build of torch
        if max(errors) <= 4 * torch.finfo(dtype).eps * scale:
            names.append(name)
    return names if "torch" in names else [*names, "torch"]


def cancelling_layer(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A weight and rows whose products are nothing but rounding error.

    The second half of every sum takes away what the first half added, so the result is what the
    additions rounded off: it differs for any other order of the sum. With plain random numbers a
    bfloat16 result hides a difference in float32 sums in all but one of some 50 000 elements.

    Returns:
        (weight [O, I], rows [max(_PROBE_ROWS), I]).
    """
    generator = torch.Generator().manual_seed(1)
    half = inputs // 2
    weight = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(max(_PROBE_ROWS), inputs, generator=generator)
    order = torch.randperm(half, generator=generator)
    weight[:, half : 2 * half] = -weight[:, :half][:, order]
    rows[:, half : 2 * half] = rows[:, :half][:, order]
    if inputs % 2:
        rows[:, -1] = 0
    return weight.to(dtype).to(device), rows.to(dtype).to(device)


def find_row_window(product: Product, rows: Tensor) -> RowWindow | None:
    """Find row counts over which every row of a product is bitwise the same.

    Args:
        product: The linear layer, [N, I] -> [N, O].
        rows: [max(_PROBE_ROWS), I], from `cancelling_layer`.

    Returns:
        The window with the fewest least rows that reaches at least 64 rows, or None.
    """
    heads = {n: product(rows[:n]) for n in _PROBE_ROWS}
    tails = {n: product(rows[-n:].clone()) for n in _PROBE_ROWS}

    def agree(a: int, b: int) -> bool:  # a <= b
        return torch.equal(heads[a], heads[b][:a]) and torch.equal(tails[a], tails[b][-a:])

    def shifted(n: int) -> bool:  # a row's place among the others must not matter either
        moved = product(rows[: n + 1].roll(1, 0)[: n + 1].contiguous())
        return torch.equal(moved[1:], product(rows[: n + 1])[:-1])

    for i, least in enumerate(_PROBE_ROWS):
        most = least
        for n in _PROBE_ROWS[i + 1 :]:
            if not agree(least, n):
                break
            most = n
        # Twice the least, so that more rows than the most can be parted within the window.
        if most >= max(64, 2 * least) and all(
            shifted(n) for n in (least, 2 * least, 16, 33) if n < most
        ):
            return RowWindow(least, most)
    return None


class RowStableLinear(nn.Module):
    """Drop-in for nn.Linear at inference with a chosen kernel and row window.

    Args:
        linear: The layer to replace; its weight is packed and the original let go.
        kernel: A name of KERNELS.
        window: Row counts to run with, None to run with whatever comes.
    """

    def __init__(self, linear: nn.Linear, kernel: str, window: RowWindow | None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias = None if linear.bias is None else linear.bias.detach()
        self._product = KERNELS[kernel](linear.weight.detach(), bias)
        self.window = window
        self.is_windowed = window is not None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        rows = x.reshape(-1, self.in_features)
        out = run_windowed(self._product, rows, self.window if self.is_windowed else None)
        return out.view(*x.shape[:-1], self.out_features)


def run_windowed(product: Product, rows: Tensor, window: RowWindow | None) -> Tensor:
    """Run a product with row counts inside its window.

    Args:
        product: [N, I] -> [N, O].
        rows: [N, I].
        window: Allowed row counts, or None.

    Returns:
        [N, O]; fewer rows than the window's least are padded with zeros, more than its most are
        run in parts of nearly equal size.
    """
    n = rows.shape[0]
    if window is None or window.least <= n <= window.most:
        return product(rows)
    if n < window.least:
        padded = nn.functional.pad(rows, (0, 0, 0, window.least - n))
        return product(padded)[:n]
    parts = -(-n // window.most)
    return torch.cat([product(part.contiguous()) for part in rows.tensor_split(parts)])


def replace_linears(
    root: nn.Module, kernel: str, windows: Mapping[tuple[int, int], RowWindow] | None
) -> None:
    """Replace every nn.Linear below `root`, in place.

    Args:
        root: A module.
        kernel: A name of KERNELS.
        windows: Window by (I, O); None runs layers with whatever rows come.
    """
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                shape = (child.in_features, child.out_features)
                window = None if windows is None else windows[shape]
                setattr(module, name, RowStableLinear(child, kernel, window))


def linear_shapes(root: nn.Module) -> list[tuple[int, int]]:
    """Distinct (I, O) of the nn.Linear layers below `root`."""
    found = {(m.in_features, m.out_features) for m in root.modules() if type(m) is nn.Linear}
    return sorted(found)


def find_windows(
    shapes: Sequence[tuple[int, int]], kernel: str, dtype: torch.dtype, device: torch.device
) -> dict[tuple[int, int], RowWindow] | None:
    """Find one row window for each shape, or None if a shape has none.

    Wide layers (an output head) are probed on a slice of their outputs first; the real layer is
    covered by the end-to-end check (exact.py).
    """
    windows = {}
    for inputs, outputs in shapes:
        weight, rows = cancelling_layer(inputs, min(outputs, 8192), dtype, device)
        window = find_row_window(KERNELS[kernel](weight, None), rows)
        if window is None:
            return None
        windows[(inputs, outputs)] = window
    return windows
