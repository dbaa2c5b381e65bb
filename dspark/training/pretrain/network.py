"""The whole of a small V4 with gradients, its start, and its tensors by official names.

Letters: B sequences, S tokens, n = B * S rows, N streams, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark.base_model.config import V4Config
from dspark.errors import CheckpointError
from dspark.training.pretrain.attention import Notes, RMSNorm, Shape
from dspark.training.pretrain.block import Block, Experts, Router, collapse_streams
from dspark.training.pretrain.ops import round_fp4, text_loss

__all__ = [
    "Behind",
    "V4Network",
    "fill_hash_tables",
    "initialise",
    "load_official",
    "official_tensors",
    "rounded_experts",
]

_STD = 0.02
_KEPT_STREAM = 4.0  # bias of a stream towards itself: about 0.95 of it stays
_READ_STREAM = 2.0  # bias of a half towards the stream it reads first
_MIX_SCALE = 0.1  # of what depends on the token in the mixing, at the start


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """What leaves the layers.

    Attributes:
        streams: [n, N, D], behind the last layer.
        captured: [n, D] by layer, the mean of the streams behind it.
    """

    streams: Tensor
    captured: dict[int, Tensor]


class V4Network(nn.Module):
    """DeepSeek-V4 over whole sequences.

    Args:
        config: The model; its draft stages are not built.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        streams, hidden = config.hc_mult, config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, hidden)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.empty(streams, streams * hidden))
        self.hc_head_base = nn.Parameter(torch.zeros(streams))
        self.hc_head_scale = nn.Parameter(torch.ones(1))

    def forward(self, token_ids: Tensor, notes: Notes, *, capture: Sequence[int] = ()) -> Behind:
        """Run sequences from position 0.

        Args:
            token_ids: int64 [B, S].
            notes: Says how, and collects losses and loads.
            capture: Layers whose streams' mean is wanted.
        """
        batch, length = token_ids.shape
        shape = Shape(self.config, batch, length, self.embed.weight.dtype)
        flat = token_ids.flatten()
        streams = self.embed(flat)[:, None].repeat(1, self.config.hc_mult, 1)
        captured = {}
        for number, layer in enumerate(self.layers):
            streams = layer(streams, flat, shape, notes)
            if number in capture:
                captured[number] = streams.mean(1)
        return Behind(streams, captured)

    def final(self, streams: Tensor) -> Tensor:
        """What the head gets, [n, D], of streams [n, N, D]."""
        c = self.config
        fn, base, scale = self.hc_head_fn, self.hc_head_base, self.hc_head_scale
        out: Tensor = self.norm(collapse_streams(streams, fn, base, scale, c))
        return out

    def logits(self, streams: Tensor) -> Tensor:
        """Logits [n, V] of streams [n, N, D]."""
        out: Tensor = self.head(self.final(streams))
        return out

    def loss(self, token_ids: Tensor, labels: Tensor, notes: Notes) -> Tensor:
        """Mean cross-entropy of labels int64 [B, S] behind token ids int64 [B, S]."""
        final = self.final(self(token_ids, notes).streams)
        return text_loss(final, self.head.weight, labels.flatten())


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draw the parameters; each depends on the seed and its name alone.

    Matrices are normal with deviation 0.02, those that write to the streams smaller by the square
    root of twice the depth. The hyper-connections start as plain residuals: streams keep to
    themselves, and the halves read one after the other (Hyper-Connections, arXiv 2409.19606).
    """
    depth = sum(isinstance(m, Block) for m in module.modules())
    for name, parameter in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("hc_"):
            _start_streams(name, parameter, seed)
        elif parameter.dim() >= 2:
            is_output = "wo_b." in name or name.endswith(("experts.w2", "shared_experts.w2.weight"))
            std = _STD / math.sqrt(2 * depth) if is_output else _STD
            is_bias = leaf == "ape"
            parameter.copy_(_normal(name, parameter.shape, seed) * (0.0 if is_bias else std))


def _normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=draws)


def _start_streams(name: str, parameter: Tensor, seed: int) -> None:
    """Start of a hyper-connection's tensor."""
    kind = name.rsplit("_", 1)[-1]
    if kind == "fn":
        parameter.copy_(_normal(name, parameter.shape, seed) * _STD)
    elif kind == "scale":
        parameter.fill_(_MIX_SCALE)
    elif name.endswith("hc_head_base"):
        parameter.zero_()
    else:
        count = math.isqrt(len(parameter) + 1) - 1  # (2 + N) N numbers
        parameter.zero_()
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        half = 2 * (numbers[0] if numbers else 0) + ("hc_ffn" in name)
        parameter[:count] = -_READ_STREAM
        parameter[half % count] = _READ_STREAM
        parameter[2 * count :].view(count, count).fill_diagonal_(_KEPT_STREAM)


@torch.no_grad()
def fill_hash_tables(module: nn.Module, counts: Tensor) -> None:
    """Give tokens their experts in hash-routed layers, so that experts get equal shares.

    Tokens in order of frequency each take the experts that have least so far. How the release
    made its table is not known.

    Args:
        module: With routers.
        counts: int64 [V], how often tokens are in the training text.
    """
    routers = [m for m in module.modules() if isinstance(m, Router) and m.is_hashed]
    for shift, router in enumerate(routers):
        table = router.tid2eid
        experts, k = router.weight.shape[0], table.shape[1]
        load = torch.zeros(experts, dtype=torch.float64)
        # Another first expert in every layer, so that no two tokens share all experts of all.
        ranks = torch.arange(experts).roll(shift * (experts // 3 + 1))
        tie = torch.empty(experts, dtype=torch.float64)
        tie[ranks] = torch.arange(experts, dtype=torch.float64) * 1e-9
        for token in counts.argsort(descending=True, stable=True).tolist():
            picked = (load + tie).argsort(stable=True)[:k]
            table[token] = picked
            load[picked] += float(counts[token]) + 1.0


@contextmanager
def rounded_experts(module: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Compute with experts as FP4 packs them; gradients go to the unrounded ones unchanged.

    **Source:** quantisation-aware training of the experts, DeepSeek-V4 report; the rounding is
    that of `dspark.base_model.fp4`.
    """
    stacks = [m for m in module.modules() if isinstance(m, Experts)] if enabled else []
    parameters = [p for stack in stacks for p in (stack.w13, stack.w2)]
    kept = [p.data for p in parameters]
    try:
        for parameter in parameters:
            parameter.data = round_fp4(parameter.data)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def official_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """All tensors by official names, experts apart; views.

    Args:
        module: A network, or a draft module.
        prefix: Before all names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if name.endswith("experts.w13"):
            base = prefix + name.removesuffix("w13")
            for e in range(tensor.shape[0]):
                found[f"{base}{e}.w1.weight"] = tensor[e, 0]
                found[f"{base}{e}.w3.weight"] = tensor[e, 1]
        elif name.endswith(".experts.w2"):
            base = prefix + name.removesuffix("w2")
            for e in range(tensor.shape[0]):
                found[f"{base}{e}.w2.weight"] = tensor[e]
        else:
            found[prefix + name] = tensor
    return found


@torch.no_grad()
def load_official(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy tensors of official names into a network or a draft module.

    Raises:
        CheckpointError: If one is missing or of another shape.
    """
    for name, tensor in official_tensors(module, prefix).items():
        if name not in tensors:
            raise CheckpointError(f"there is no tensor {name}.")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}, but needs {list(tensor.shape)}."
            )
        tensor.copy_(tensors[name])
