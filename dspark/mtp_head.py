"""Sequential heads: what a drafted token adds to the logits of its children, and confidence.

A DSpark backbone predicts all positions of a block at once, so its base logits U_i know nothing of
the tokens drafted before position i. A sequential head adds a bias that depends on the branch:

- vanilla: B(x) = W2 W1[x], a first-order Markov chain of low rank;
- gated: B_i(x) = W2 (sigmoid(G [h_i ; W1[x]]) * W1[x]);
- rnn: [g ; c ; o] = J [s ; W1[x] ; h_i], s' = sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c),
  B = W2 tanh(o), with a state s along the branch that starts at zero.

x is the token before the predicted one, h_i the backbone's hidden state of the slot that predicts.
All branches of a level go through one product with W2.

**Source:** DSpark, arXiv 2607.05147, equations 2 to 8; DeepSpec's heads for the order of the
concatenated inputs.

Letters: R rows (branches), D hidden size, K rank, S state size, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.errors import ConfigError, ShapeError

__all__ = [
    "ConfidenceHead",
    "DraftVocab",
    "GatedMarkovHead",
    "MarkovHead",
    "RNNHead",
    "build_head",
    "few_rows",
    "project",
]

_FEW = 3  # rows up to which F.linear reads the weights once on a CPU


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocab:
    """The tokens a draft can propose, among the target's.

    Attributes:
        size: V, the target's vocabulary.
        ids: int64 [Vd], the target's id of every row of the draft's logits, ascending; None if the
            draft has the whole vocabulary.
    """

    size: int
    ids: Tensor | None = None

    @staticmethod
    def build(size: int, ids: Sequence[int] | Tensor | None) -> DraftVocab:
        """Make a vocabulary, checking the ids.

        Raises:
            ConfigError: If ids are not ascending or outside the vocabulary.
        """
        if ids is None:
            return DraftVocab(size)
        tensor = torch.as_tensor(ids, dtype=torch.int64)
        inside = tensor.ndim == 1 and len(tensor) > 0
        if inside:
            inside = int(tensor.min()) >= 0 and int(tensor.max()) < size
        if not inside or not bool((tensor[1:] > tensor[:-1]).all()):
            raise ConfigError(
                f"the ids of a draft vocabulary must ascend within 0 to {size - 1}, each once."
            )
        return DraftVocab(size, tensor)

    @property
    def draft_size(self) -> int:
        """Vd."""
        return self.size if self.ids is None else int(self.ids.shape[0])

    def to(self, device: torch.device) -> DraftVocab:
        """The same vocabulary with its ids on a device."""
        return DraftVocab(self.size, None if self.ids is None else self.ids.to(device))

    def widen(self, logits: Tensor) -> Tensor:
        """Lay draft logits [R, Vd] over the target's vocabulary: [R, V], -inf elsewhere."""
        if logits.shape[-1] != self.draft_size:
            raise ShapeError(
                f"draft logits have {logits.shape[-1]} columns, but the draft vocabulary has "
                f"{self.draft_size} tokens."
            )
        if self.ids is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.size), -torch.inf)
        wide[..., self.ids] = logits
        return wide

    def reduce(self, tokens: Tensor) -> Tensor:
        """Rows of target token ids in the draft's logits, -1 where the draft has none."""
        if self.ids is None:
            return tokens
        rows = torch.full((self.size,), -1, dtype=torch.int64, device=tokens.device)
        rows[self.ids] = torch.arange(self.draft_size, device=tokens.device)
        return rows[tokens]


def few_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Product rows [R, K] x weight [N, K] -> [R, N] for few rows and many outputs.

    On a CPU in float32 `F.linear` reads the weights anew for every few rows (measured:
    benchmarks/draft_cost.py); the product the other way round does not. Gradients flow either way.
    """
    plain = rows.shape[0] <= _FEW or rows.ndim != 2 or rows.device.type != "cpu"
    if plain or rows.dtype is not torch.float32:
        return F.linear(rows, weight)
    return (weight @ rows.T).T


def project(rows: Tensor, layer: nn.Module) -> Tensor:
    """`few_rows` of a linear layer without biases, or what another kind of layer makes of rows."""
    if isinstance(layer, nn.Linear):
        return few_rows(rows, layer.weight)
    product: Tensor = layer(rows)
    return product


class MarkovHead(nn.Module):
    """Vanilla head, and the interface of all.

    Args:
        vocab_size: V, tokens that can precede.
        draft_vocab_size: Vd, tokens that can follow.
        rank: K >= 1.
    """

    kind = "vanilla"
    state_size = 0
    reads_hidden = False

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"markov_rank is {rank}, but a sequential head needs >= 1.")
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)

    def start(self, hidden: Tensor) -> Tensor:
        """State before the anchor of as many branches as `hidden` [R, D] has rows: [R, S]."""
        return hidden.new_zeros(hidden.shape[0], self.state_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """W1 of tokens int64 [R]: [R, K]."""
        embedded: Tensor = self.markov_w1(tokens)
        return embedded

    def latent(self, state: Tensor, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What W2 is applied to, and the state after the token.

        Args:
            state: [R, S], state of each branch before its last token.
            previous: [R, K], W1 of that token.
            hidden: [R, D], hidden state of the slot that predicts the branch's children.

        Returns:
            ([R, K], [R, S]).
        """
        return previous, state

    def step(self, state: Tensor, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Bias of the children of many branches at once.

        Args:
            state: [R, S], as `latent`.
            tokens: int64 [R], last token of each branch; the anchor for the first position.
            hidden: [R, D], as `latent`.

        Returns:
            (bias [R, Vd], states [R, S] that the children continue from).
        """
        latent, after = self.latent(state, self.embed(tokens), hidden)
        return project(latent, self.markov_w2), after

    def unroll(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Biases along known branches, for training.

        Args:
            tokens: int64 [R, G], token before each predicted one; column 0 is the anchor.
            hidden: [R, G, D].

        Returns:
            [R, G, Vd].
        """
        state, latents = self.start(hidden[:, 0]), []
        for position in range(tokens.shape[1]):
            previous = self.embed(tokens[:, position])
            latent, state = self.latent(state, previous, hidden[:, position])
            latents.append(latent)
        biases: Tensor = self.markov_w2(torch.stack(latents, dim=1))
        return biases


class GatedMarkovHead(MarkovHead):
    """Markov head whose latent is gated by the hidden state.

    Args:
        vocab_size: V.
        draft_vocab_size: Vd.
        rank: K.
        hidden_size: D.
    """

    kind = "gated"
    reads_hidden = True

    def __init__(
        self, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
    ) -> None:
        super().__init__(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, rank=rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def latent(self, state: Tensor, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `MarkovHead.latent`."""
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], dim=-1)))
        return gate * previous, state


class RNNHead(MarkovHead):
    """Head with a state along the branch, so that it knows all tokens of the block.

    Args:
        vocab_size: V.
        draft_vocab_size: Vd.
        rank: K, also the size of the state.
        hidden_size: D.
    """

    kind = "rnn"
    reads_hidden = True

    def __init__(
        self, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
    ) -> None:
        super().__init__(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, rank=rank)
        self.state_size = rank
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def latent(self, state: Tensor, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `MarkovHead.latent`."""
        joint = self.joint_proj(torch.cat([state, previous, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """Chance that a slot's first candidate is accepted, given that its prefix was.

    Args:
        hidden_size: D.
        rank: K of the sequential head whose W1 it reads, 0 to read the hidden state alone.
        has_bias: V4's own head has none, DeepSpec's has one.
    """

    def __init__(self, hidden_size: int, rank: int = 0, *, has_bias: bool = True) -> None:
        super().__init__()
        self.rank = rank
        self.proj = nn.Linear(hidden_size + rank, 1, bias=has_bias)

    def forward(self, hidden: Tensor, previous: Tensor | None = None) -> Tensor:
        """Confidence logits.

        Args:
            hidden: [..., D], hidden state of the slot that predicts.
            previous: [..., K], W1 of the token before; ignored at rank 0.

        Returns:
            float32 [...]; sigmoid of it is the confidence.

        Raises:
            ShapeError: If the head reads W1 and there is none.
        """
        if self.rank:
            if previous is None:
                raise ShapeError("this confidence head reads W1 of the previous token.")
            hidden = torch.cat([hidden, previous.to(hidden.dtype)], dim=-1)
        logits: Tensor = self.proj(hidden)
        return logits.squeeze(-1).float()


def build_head(
    kind: str, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
) -> MarkovHead | None:
    """Make a sequential head by its name in checkpoints.

    Args:
        kind: "vanilla", "gated" or "rnn".
        vocab_size: V.
        draft_vocab_size: Vd.
        rank: K; 0 is no head (DFlash).
        hidden_size: D.

    Returns:
        The head, or None at rank 0.

    Raises:
        ConfigError: If the name is unknown or the rank negative.
    """
    if rank == 0:
        return None
    sizes = {"vocab_size": vocab_size, "draft_vocab_size": draft_vocab_size, "rank": rank}
    if kind == "vanilla":
        return MarkovHead(**sizes)
    if kind == "gated":
        return GatedMarkovHead(**sizes, hidden_size=hidden_size)
    if kind == "rnn":
        return RNNHead(**sizes, hidden_size=hidden_size)
    raise ConfigError(f"markov_head_type is {kind!r}, but must be vanilla, gated or rnn.")
