"""Drafts to convert, and what conversions are compared by."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import torch

from dspark.draft.formats.convert import convert_draft
from dspark.draft.formats.detect import load_draft
from dspark.draft.formats.native import save_module
from dspark.draft.formats.programs import Program
from dspark.draft.formats.stored import read_draft
from dspark.mtp_head import DraftVocab
from tests.draft.dspark_models import VOCAB, make_features, make_module, target_info
from tests.training.toys import ToyTeacher

REDUCED = DraftVocab.build(VOCAB, range(3, VOCAB, 2))
SHARED = {"owns_embedding": False, "owns_head": False}
DFLASH = {"sample_from_anchor": False, "enable_confidence_head": False}
INFO = target_info()


class Target(ToyTeacher):
    def __init__(self):
        super().__init__()
        self.info = INFO


def lend(dtype=torch.float32):
    return Target()


def not_asked(dtype):
    raise AssertionError("the target was loaded")


def native(folder, style="qwen3", head="vanilla", *, storage="float32", **options):
    """A draft in dspark's own layout, which can say anything."""
    if not (options.get("owns_embedding", True) and options.get("owns_head", True)):
        options["shares"] = Target()
    module = make_module(style, head, **options)
    target = {"id": "org/toy"}
    return save_module(folder, module, storage=storage, target=target, training={"steps": 7})


def run(source, dest, to, **options):
    lender = options.pop("lender", lend)
    return convert_draft(source, dest, Program(to), info=INFO, lender=lender, **options)


def tree_of(folder, make_context):
    drafter = load_draft(folder, Target())
    features = make_features(11, layers=drafter.capture)
    tree = drafter.propose([make_context(list(range(1, 13)), budget=9, features=features)])[0].tree
    assert tree.num_nodes > 2
    return tree.token.tolist(), tree.parent.tolist()


def assert_same_draft(one, other, *, apart=()):
    """Settings and tensors are the same, up to the parts of the target."""
    first, second = read_draft(one, INFO), read_draft(other, INFO)
    flags = {"owns_embedding": True, "owns_head": True}
    assert replace(first.config, **flags) == replace(second.config, **flags)
    names = first.tensors.keys() ^ second.tensors.keys()
    assert names <= {"embed_tokens.weight", "lm_head.weight"}
    for name in first.tensors.keys() & second.tensors.keys():
        assert torch.equal(first.tensors[name], second.tensors[name]), name
    if first.vocab.ids is not None:
        assert torch.equal(first.vocab.ids, second.vocab.ids)


def started(folder, tmp_path, **environment):
    """The arguments that serve.sh gives the server, as JSON."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("vllm", "python3"):
        path = tools / name
        path.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **environment}
    out = subprocess.run(
        [folder / "serve.sh", "--port", "8001"], capture_output=True, text=True, env=env
    )
    return out.stdout.split("\0")[:-1], out


def option(arguments, name):
    return arguments[arguments.index(name) + 1]
