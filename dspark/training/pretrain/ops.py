"""Operations of V4 with gradients of their own, made for few passes over memory on a CPU.

What torch would record step by step (39 normalisations of a Sinkhorn matrix, a softmax with its
copies, an expert at a time) is one node of the graph here, with its gradient written down.
All are deterministic: rows are gathered, never scattered. Letters: n rows, N streams, D hidden,
E experts, H heads, c head size, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.base_model.fp4 import fp4_act_quant

__all__ = [
    "Dispatch",
    "attend",
    "grouped_linear",
    "join_rows",
    "project_streams",
    "round_fp4",
    "select_rows",
    "sinkhorn",
    "text_loss",
    "turn",
    "write_streams",
]

_LOSS_ROWS = 1024  # rows of the vocabulary's width at a time


class _Sinkhorn(torch.autograd.Function):
    """Softmax over rows, then columns and rows in turn; see `sinkhorn`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        # Tokens last: a sum over 4 neighbours in memory is slow, one over 4 vectors is not.
        c = logits.permute(1, 2, 0).contiguous().softmax(1)
        ctx.softmax = c
        c = c + eps
        ctx.steps = []
        for step in range(2 * iterations - 1):
            axis = step % 2  # columns first: their sum runs over axis 0
            total = c.sum(axis, keepdim=True).add_(eps)
            c = c / total
            ctx.steps.append((c, total, axis))
        # Laid out by token again: products of matrices with other strides go one by one.
        return c.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        g = grad.permute(1, 2, 0).contiguous()
        for c, total, axis in reversed(ctx.steps):
            # c = x / total(x): dx = (g - sum(g c)) / total
            g = (g - (g * c).sum(axis, keepdim=True)).div_(total)
        s = ctx.softmax
        g = g * s
        g = g - s * g.sum(1, keepdim=True)
        return g.permute(2, 0, 1).contiguous(), None, None


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic matrices [n, N, N] of logits [n, N, N]; V4's order of steps."""
    out: Tensor = _Sinkhorn.apply(logits, iterations, eps)  # type: ignore[no-untyped-call]
    return out


class _ProjectStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, fn: Tensor, eps: float) -> Tensor:
        ctx.shape = streams.shape
        flat = streams.flatten(1)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        scale = torch.rsqrt(length.square() / flat.shape[1] + eps)
        out = torch.mm(flat, fn.T).mul_(scale)
        ctx.save_for_backward(flat, fn, scale, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, fn, scale, out = ctx.saved_tensors
        scaled = grad * scale
        # d scale / d flat = -flat * scale^3 / width, and out = (flat fn^T) * scale.
        pull = (grad * out).sum(1, keepdim=True).mul_(scale.square()).div_(-flat.shape[1])
        d_flat = torch.mm(scaled, fn).addcmul_(flat, pull)
        d_fn = torch.mm(scaled.T, flat)
        return d_flat.view(ctx.shape), d_fn, None


def project_streams(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Streams [n, N, D], normalised as one vector without a weight, times fn [O, N D]: [n, O]."""
    out: Tensor = _ProjectStreams.apply(streams, fn, eps)  # type: ignore[no-untyped-call]
    return out


class _WriteStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        out = torch.bmm(post[:, :, None], y[:, None])
        return out.baddbmm_(comb.transpose(1, 2), streams)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams, y, post, comb = ctx.saved_tensors
        d_streams = torch.bmm(comb, grad)
        d_y = torch.bmm(post[:, None], grad)[:, 0]
        d_post = torch.bmm(grad, y[:, :, None])[:, :, 0]
        d_comb = torch.bmm(streams, grad.transpose(1, 2))
        return d_streams, d_y, d_post, d_comb


def write_streams(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams [n, N, D]: stream k takes comb[:, j, k] of stream j and post[:, k] of y."""
    out: Tensor = _WriteStreams.apply(streams, y, post, comb)  # type: ignore[no-untyped-call]
    return out


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.turns = turns
        return _turned(x, turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _turned(grad, ctx.turns.conj()), None


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    pairs = out[..., -2 * turns.shape[-1] :].unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turns if x.dim() == 2 else turns[:, None])
    return out


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the last r dims of rows [n, d] or [n, H, d], pairs (2i, 2i + 1), by [n, r / 2]."""
    out: Tensor = _Turn.apply(x, turns)  # type: ignore[no-untyped-call]
    return out


class _TextLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros(())
        for a in range(0, len(labels), _LOSS_ROWS):
            rows, wanted = hidden[a : a + _LOSS_ROWS], labels[a : a + _LOSS_ROWS, None]
            logits = torch.mm(rows, head.T)
            top = logits.amax(1, keepdim=True)
            own = logits.gather(1, wanted) - top
            law = logits.sub_(top).exp_()
            sums = law.sum(1, keepdim=True)
            total += (sums.log() - own).sum()
            law.div_(sums).scatter_add_(1, wanted, torch.full_like(own, -1.0))
            torch.mm(law, head, out=d_hidden[a : a + _LOSS_ROWS])
            d_head.addmm_(law.T, rows)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.count = len(labels)
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * (grad / ctx.count), d_head * (grad / ctx.count), None


def text_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels int64 [n], with gradients found on the way.

    Args:
        hidden: [n, D], what the head gets.
        head: [V, D].
        labels: int64 [n].
    """
    if not torch.is_grad_enabled():
        return F.cross_entropy(F.linear(hidden, head), labels)
    out: Tensor = _TextLoss.apply(hidden, head, labels)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """Which rows go to which expert.

    Attributes:
        rows: int64 [n * k], row of every place, places ordered by expert.
        order: int64 [n * k], which of (row, choice), row-major, is at a place.
        inverse: int64 [n * k], the place of every (row, choice).
        bounds: First place of every expert, and the end.
        choices: k.
    """

    rows: Tensor
    order: Tensor
    inverse: Tensor
    bounds: list[int]
    choices: int

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Dispatch:
        """Of chosen experts int64 [n, k]."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(flat, minlength=experts).tolist()
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return Dispatch(order // chosen.shape[1], order, inverse, bounds, chosen.shape[1])

    @property
    def counts(self) -> list[int]:
        """Rows of every expert."""
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x[dispatch.rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d = ctx.dispatch
        return grad[d.inverse].unflatten(0, (-1, d.choices)).sum(1), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        out: Tensor = y[dispatch.inverse].unflatten(0, (-1, dispatch.choices)).sum(1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.dispatch.rows], None


def select_rows(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows [n, D] laid out by expert: [n * k, D]."""
    out: Tensor = _SelectRows.apply(x, dispatch)  # type: ignore[no-untyped-call]
    return out


def join_rows(y: Tensor, dispatch: Dispatch) -> Tensor:
    """Sum over a row's experts [n, D] of what is laid out by expert [n * k, D]."""
    out: Tensor = _JoinRows.apply(y, dispatch)  # type: ignore[no-untyped-call]
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e in range(weight.shape[0]):
            a, b = bounds[e], bounds[e + 1]
            if a < b:
                torch.mm(x[a:b], weight[e].T, out=out[a:b])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        for e in range(weight.shape[0]):
            a, b = ctx.bounds[e], ctx.bounds[e + 1]
            if a < b:
                torch.mm(grad[a:b], weight[e], out=dx[a:b])
                torch.mm(grad[a:b].T, x[a:b], out=dw[e])
            else:
                dw[e].zero_()
        return dx, dw, None


def grouped_linear(x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """Rows of every expert times its matrix.

    Args:
        x: [m, I], ordered by expert.
        weight: [E, O, I].
        bounds: First row of every expert, and the end.

    Returns:
        [m, O].
    """
    out: Tensor = _GroupedLinear.apply(x, weight, bounds)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, sink: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        groups, rows, heads, size = query.shape
        flat = query.reshape(groups, rows * heads, size)
        scores = torch.bmm(flat, keys.transpose(1, 2)).mul_(scale)
        columns = scores.view(groups, rows, heads, -1)
        columns.view(-1, *bias.shape[:2], heads, bias.shape[2]).add_(bias[:, :, None])
        top = torch.maximum(columns.amax(-1), sink)[..., None]
        law = columns.sub_(top).exp_()
        total = law.sum(-1, keepdim=True).add_((sink[:, None] - top).exp())
        law.div_(total)
        out = torch.bmm(scores, keys).view(query.shape)
        ctx.save_for_backward(flat, keys, scores, out)
        ctx.scale = scale
        law = scores.view(groups, rows, heads, -1)
        ctx.mark_non_differentiable(law)
        return out, law

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        flat, keys, law, out = ctx.saved_tensors
        groups, rows, heads, size = out.shape
        grad = grad.reshape(groups, rows * heads, size)
        dot = (grad * out.view(grad.shape)).sum(-1, keepdim=True)
        d_scores = torch.bmm(grad, keys.transpose(1, 2)).sub_(dot).mul_(law)
        # The sink's share is what the others leave, its value is 0: d = share * (0 - dot).
        left = 1 - law.sum(-1, keepdim=True)
        d_sink = -(left * dot).view(groups * rows, heads).sum(0)
        d_keys = torch.bmm(law.transpose(1, 2), grad)
        d_keys.baddbmm_(d_scores.transpose(1, 2), flat, alpha=ctx.scale)
        d_query = torch.bmm(d_scores, keys).mul_(ctx.scale)
        return d_query.view(out.shape), d_keys, d_sink, None, None


def attend(query: Tensor, keys: Tensor, sink: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over keys that are the values too, with a sink per head.

    Args:
        query: [G, R, H, c], G groups of R rows.
        keys: [G, T, c], what the rows of a group see.
        sink: [H].
        bias: [G, R, T], or [g, R, T] for every g groups alike: 0 where a row sees a key, else
            -inf. A row that sees none gets zeros.

    Returns:
        [G, R, H, c], and the shares [G, R, H, T], through which no gradient flows.
    """
    out: tuple[Tensor, Tensor] = _Attend.apply(query, keys, sink, bias, query.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
    return out


def round_fp4(weight: Tensor) -> Tensor:
    """What packed FP4 holds of a weight [..., I]."""
    return fp4_act_quant(weight)
