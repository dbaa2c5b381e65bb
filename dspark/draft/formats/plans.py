"""Which layout a program gets, what it cannot hold, and which parts of the target go with it.

| | blocks (DSpark, DFlash) | EAGLE-3 |
|---|---|---|
| dspark | its own | SafeAILab's; Gemma's layers DeepSpec's |
| deepspec | DeepSpec's | DeepSpec's |
| speculators | speculators' | speculators' |
| specforge | SpecForge's | SafeAILab's |
| vllm | DeepSpec's; SpecForge's for DFlash and sliding windows | SafeAILab's |
| sglang | SpecForge's, with its fields at top level too | SafeAILab's |

vLLM reads speculators' layout too, but that has no windows that move and no other width than the
target's, and its Llama layers of EAGLE-3 read three of the target's; SGLang refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.eagle3_module import Eagle3Config
from dspark.draft.formats.borrow import Parts
from dspark.draft.formats.limits import BlockLimits, UnrolledLimits, check_block, check_unrolled
from dspark.draft.formats.programs import Program
from dspark.draft.formats.stored import StoredDraft

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a draft is written for a program.

    Attributes:
        layout: dspark, deepspec, speculators, specforge or eagle3.
        parts: Copies of the target's that go with it.
        is_flat: Fields at top level as well; see `write_block_config`.
    """

    layout: str
    parts: Parts = field(default_factory=Parts)
    is_flat: bool = False


_BLOCKS: dict[Program, BlockLimits] = {
    Program.DEEPSPEC: BlockLimits(families=("qwen3", "gemma4"), anchors=(True,)),
    Program.SPECULATORS: BlockLimits(has_reduced_vocabulary=True, window="fixed"),
    Program.SPECFORGE: BlockLimits(window="moving"),
}
_VLLM = BlockLimits(
    families=("qwen3", "gemma4"),
    has_reduced_vocabulary=True,
    has_other_width=True,
    heads=("vanilla",),
    window="moving",
    activations=("silu",),
)
_VLLM_GEMMA = BlockLimits(families=("gemma4",), heads=("vanilla",), has_values=False)
_VLLM_DFLASH = BlockLimits(
    has_reduced_vocabulary=True,
    has_other_width=True,
    anchors=(False,),
    has_confidence=False,
    window="moving",
    activations=("silu",),
)
_SGLANG = BlockLimits(anchors=(True,), window="moving", activations=("silu",), first_layer=0)
_SGLANG_DFLASH = BlockLimits(
    anchors=(False,), has_confidence=False, window="moving", activations=("silu",), first_layer=0
)

_GEMMA = ("sandwich_norms", "layer_scalar", "v_norm", "key_is_value")
_OPTIONS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_UNROLLED: dict[Program, UnrolledLimits] = {
    Program.DEEPSPEC: UnrolledLimits(
        refused=_OPTIONS,
        needed=("qk_norm",),
        has_reduced_vocabulary=False,
        has_other_width=False,
        first_layer=0,
        reads_last=False,
    ),
    Program.SPECULATORS: UnrolledLimits(refused=(*_GEMMA, "logit_softcap", "embed_scale")),
    Program.SPECFORGE: UnrolledLimits(
        refused=(
            *_GEMMA,
            "qk_norm",
            "attention_bias",
            "mlp_bias",
            "logit_softcap",
            "embed_scale",
            "norm_before_residual",
            "norm_before_fc",
            "norm_output",
        ),
        num_layers=3,
        first_layer=0,
    ),
    Program.VLLM: UnrolledLimits(
        refused=(*_GEMMA, "logit_softcap", "embed_scale"), reads_last=False, is_sorted=True
    ),
    Program.SGLANG: UnrolledLimits(
        refused=(
            *_GEMMA,
            "qk_norm",
            "attention_bias",
            "mlp_bias",
            "logit_softcap",
            "embed_scale",
            "norm_before_residual",
            "norm_before_fc",
        ),
        least_layers=2,  # of one as wide as the draft it would skip fc
        first_layer=0,
        reads_last=False,
        is_sorted=True,
    ),
}


def make_plan(draft: StoredDraft, to: Program) -> Plan:
    """Choose the layout for a program.

    Args:
        draft: The draft.
        to: The program.

    Raises:
        CapabilityError: Naming the field that the program cannot hold.
    """
    if isinstance(draft.config, Eagle3Config):
        return _unrolled(draft.config, to, draft.num_target_layers)
    return _block(draft.config, to)


def _block(config: DSparkConfig, to: Program) -> Plan:
    if to is Program.DSPARK:
        return Plan(layout="dspark")
    limits = _block_limits(config, to)
    check_block(config, limits, _title(to, "DSpark" if config.markov_rank else "DFlash"))
    is_reduced = config.draft_vocab_size != config.vocab_size
    has_windows = any(config.backbone.windows)
    if to is Program.VLLM:
        is_dense = bool(config.markov_rank) and not has_windows
        layout = "deepspec" if is_dense else "specforge"
        # Its classes share what is absent, but not rows of a head.
        return Plan(layout=layout, parts=Parts(head=True if is_reduced else None), is_flat=True)
    if to is Program.DEEPSPEC:
        return Plan(layout="deepspec", parts=Parts(embedding=True, head=True))
    if to is Program.SPECULATORS:
        return Plan(layout="speculators", parts=Parts(head=True))
    return Plan(
        layout="specforge",
        parts=Parts(embedding=False, head=False),
        is_flat=to is Program.SGLANG,
    )


def _block_limits(config: DSparkConfig, to: Program) -> BlockLimits:
    is_dspark = bool(config.markov_rank)
    if to is Program.VLLM:
        if config.family == "gemma4" and is_dspark:
            return _VLLM_GEMMA
        return _VLLM if is_dspark else _VLLM_DFLASH
    if to is Program.SGLANG:
        return _SGLANG if is_dspark else _SGLANG_DFLASH
    limits = _BLOCKS[to]
    if to is Program.SPECFORGE:
        return BlockLimits(window=limits.window, anchors=(is_dspark,), has_confidence=is_dspark)
    if to is Program.SPECULATORS and not is_dspark:
        return BlockLimits(has_reduced_vocabulary=True, window=limits.window, has_confidence=False)
    return limits


def _unrolled(config: Eagle3Config, to: Program, num_target_layers: int) -> Plan:
    if to is Program.DSPARK:
        return Plan(layout="deepspec" if config.sandwich_norms else "eagle3")
    check_unrolled(config, _UNROLLED[to], num_target_layers, _title(to, "EAGLE-3"))
    if to is Program.DEEPSPEC:
        return Plan(layout="deepspec", parts=Parts(embedding=True))
    if to is Program.SPECULATORS:
        return Plan(layout="speculators")
    if to is Program.SGLANG and config.hidden_size == config.target_hidden_size:
        return Plan(layout="eagle3", parts=Parts(embedding=False))  # it overwrites one
    return Plan(layout="eagle3")


def _title(to: Program, kind: str) -> str:
    names = {
        Program.VLLM: "vLLM",
        Program.SGLANG: "SGLang",
        Program.SPECULATORS: "speculators",
        Program.DEEPSPEC: "DeepSpec",
        Program.SPECFORGE: "SpecForge",
    }
    return f"{kind} of {names[to]}"
