"""Time of a draft: a chain against a 15-node tree of one module, and the draft's share of a round.

    python benchmarks/draft_cost.py [--hidden 576] [--vocab 49152] [--threads 1] [--out FILE]

First a module of realistic size with random weights (peaked logits, so that trees are deep), batch
1: seconds of `propose` for a chain of gamma nodes and a tree of 15, interleaved, under every rule.
Then a target of random weights behind the engine with every drafter: share of `seconds_draft` in
the seconds of its rounds. Random drafts are seldom right; the share does not depend on that much.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from common import describe, finish, interleave, ratio

import dspark
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.target import V4Target
from dspark.base_model.weights import DictSource
from dspark.draft.base import DraftContext, Drafter
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.dspark_config import BackboneConfig, DSparkConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.registry import LoadOptions
from dspark.request import Rule, SamplingParams
from dspark.verify.noise import NoiseKey

RULES = {Rule.GREEDY: 0.0, Rule.COUPLED: 1.0, Rule.REJECTION: 1.0}
LAYERS = (1, 4, 7)


def make_module(args: argparse.Namespace, head: str) -> DSparkModule:
    """A random module whose logits are about as peaked as a trained one's."""
    torch.manual_seed(1)
    backbone = BackboneConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_heads=args.hidden // 64,
        num_kv_heads=3 if args.hidden % 192 == 0 else 1,
        head_dim=64,
        windows=(None,) * args.layers,
    )
    config = DSparkConfig(
        family="qwen3",
        backbone=backbone,
        vocab_size=args.vocab,
        draft_vocab_size=args.vocab,
        block_size=args.gamma,
        sample_from_anchor=True,
        mask_token_id=5,
        target_layer_ids=LAYERS,
        target_hidden_size=args.hidden,
        num_target_layers=args.target_layers,
        markov_rank=0 if head == "none" else args.rank,
        markov_head_type="vanilla" if head == "none" else head,
    )
    module = DSparkModule(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    module.lm_head.weight *= 12
    return module


def proposing(
    drafter: DSparkDrafter,
    args: argparse.Namespace,
    rule: Rule,
    depths: list[int],
    **shape: int | None,
) -> Callable[[], float]:
    """A call that drafts once more for a text that grew by two tokens, and gives its seconds."""
    size = itertools.count(args.context, 2)
    params = SamplingParams(temperature=RULES[rule])

    def run() -> float:
        length = next(size)
        rows = length - 1 if length == args.context else 2
        context = DraftContext(
            request_id=hash((rule, *shape.values())),
            tokens=list(range(length)),
            prompt_length=8,
            params=params,
            rule=rule,
            noise=NoiseKey(1),
            round=length,
            depth=args.gamma,
            features={layer: torch.randn(rows, args.hidden) for layer in LAYERS},
            **shape,
        )
        start = time.perf_counter()
        tree = drafter.propose([context])[0].tree
        seconds = time.perf_counter() - start
        wanted = (shape["budget"], args.gamma) if shape["width"] == 1 else (15, tree.max_depth)
        if (tree.num_nodes, tree.max_depth) != wanted:
            raise SystemExit(f"a tree of {tree.num_nodes} nodes, depth {tree.max_depth}: {wanted}")
        depths.append(tree.max_depth)
        return seconds

    return run


def chain_and_tree(args: argparse.Namespace) -> dict[str, object]:
    """Milliseconds of a chain and a tree by head and rule."""
    figures: dict[str, object] = {}
    for head in ("vanilla", "gated", "rnn", "none"):
        module = make_module(args, head)
        drafter = DSparkDrafter(module, config=DSparkDrafterConfig(min_survival=0.0))
        for rule in RULES if head == "vanilla" else (Rule.GREEDY,):
            shapes = {"chain": (args.gamma, 1), "tree": (15, None)}
            depths: dict[str, list[int]] = {name: [] for name in shapes}
            runs = {
                name: proposing(drafter, args, rule, depths[name], budget=budget, width=width)
                for name, (budget, width) in shapes.items()
            }
            times = interleave(runs, args.turns)
            figures[f"{head}, {rule.value}"] = {
                "chain ms": round(1e3 * sorted(times["chain"])[args.turns // 2], 1),
                "tree ms": round(1e3 * sorted(times["tree"])[args.turns // 2], 1),
                "tree depth": round(sum(depths["tree"]) / len(depths["tree"]), 1),
                "tree / chain": ratio(times["tree"], times["chain"]),
            }
    return figures


def make_target(args: argparse.Namespace, layers: int) -> dspark.target.Target:
    """A random Llama of the given depth."""
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=3 if args.hidden % 192 == 0 else 1,
        max_position_embeddings=4096,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    options = LoadOptions(name=f"random-{layers}", exact=False)
    return wrap_model(model, adapter_for("llama"), options, eos_token_ids=())


def make_eagle(args: argparse.Namespace) -> Eagle3Module:
    """A random EAGLE-3 layer of the target's width, as peaked as the other drafts."""
    torch.manual_seed(2)
    config = Eagle3Config(
        hidden_size=args.hidden,
        target_hidden_size=args.hidden,
        target_layers=LAYERS,
        intermediate_size=args.hidden * 8 // 3,
        num_heads=args.hidden // 64,
        num_kv_heads=3 if args.hidden % 192 == 0 else 1,
        head_dim=64,
        vocab_size=args.vocab,
        draft_vocab_size=args.vocab,
        has_embedding=True,
    )
    module = Eagle3Module(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    module.lm_head.weight *= 12
    return module


def make_v4(args: argparse.Namespace, preset_name: str) -> V4Target:
    """A random V4 of the smallest preset's kinds of layers with its own draft, somewhat wider."""
    config = replace(preset(preset_name), hidden_size=256, vocab_size=8192, num_hash_layers=1)
    tensors = dict(random_tensors(config, seed=1, quantised=False))
    source = DictSource(tensors)
    model = V4Model(config, source, DictExperts(tensors), dtype=torch.float32)
    return V4Target(model, name=preset_name, eos_token_ids=())


def shares(args: argparse.Namespace) -> dict[str, object]:
    """Share of the draft in the time of its rounds, by drafter; V4's own on a V4 of 5 layers."""
    target = make_target(args, args.target_layers)
    pairs = {name: (target, drafter) for name, drafter in wrapped_drafters(args).items()}
    for name, kind in (("V4's dspark", "v4-tiny-dspark"), ("V4's mtp", "v4-tiny-mtp")):
        v4 = make_v4(args, kind)
        own = v4.own_drafter()
        if own is not None:
            pairs[name] = (v4, own)
    return {name: share_of(args, *pair) for name, pair in pairs.items()}


def wrapped_drafters(args: argparse.Namespace) -> dict[str, Drafter]:
    """Drafters for the random Llama."""
    return {
        "dspark": DSparkDrafter(make_module(args, "vanilla")),
        "dflash": DSparkDrafter(make_module(args, "none"), name="dflash"),
        "eagle3": Eagle3Drafter(make_eagle(args)),
        "lookup": LookupDrafter(),
        "model": ModelDrafter(make_target(args, args.layers), vocab_size=args.vocab),
    }


def share_of(
    args: argparse.Namespace, target: dspark.target.Target, drafter: Drafter
) -> dict[str, float]:
    """One drafter's share, and milliseconds of its rounds."""
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, tree_budget=15)
    prompt = [7 + i % 50 for i in range(args.context)]
    engine = dspark.Engine(target, drafter=drafter, config=dspark.EngineConfig(auto_off=False))
    engine.generate([prompt], SamplingParams(max_tokens=3))
    (result,) = engine.generate([prompt], params)
    stats = result.stats
    total = stats.seconds_draft + stats.seconds_verify + stats.seconds_rest
    return {
        "share": round(stats.seconds_draft / total, 3),
        "draft ms": round(1e3 * stats.seconds_draft / stats.rounds, 1),
        "round ms": round(1e3 * total / stats.rounds, 1),
        "nodes": round(stats.proposed / stats.rounds, 1),
    }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 576),
        ("vocab", 49152),
        ("layers", 2),
        ("rank", 256),
        ("gamma", 7),
        ("context", 256),
        ("target-layers", 30),
        ("tokens", 16),
        ("turns", 7),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {
        "schema": 1,
        "run": describe(),
        "sizes": {k: v for k, v in vars(args).items() if k != "out"},
        "chain and tree": chain_and_tree(args),
        "share of a round": shares(args),
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
