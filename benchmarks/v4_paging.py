"""A DeepSeek-V4 model larger than the memory it may use: experts read from disk as they are wanted.

    python benchmarks/v4_paging.py [--folder DIR] [--limit 2GB] [--expert-memory 600MB] [--out FILE]

Writes a checkpoint of random weights in the release's layout (FP4 experts, FP8 linears, official
names) of 3 GB or more, in which routed experts dominate as in the release; decodes greedily in a
process of its own under a limit well below the file size; decodes the same without any limit; and
compares the tokens. The files are deleted afterwards unless `--keep` is given.

What is limited is RLIMIT_DATA, set before anything is loaded: heap and every private writable
mapping of the process, which is all memory that the system could not take back by itself. Not
limited: pages of files that the system keeps in its page cache. RLIMIT_AS would also count address
space that no memory stands behind, and RLIMIT_RSS does nothing on Linux. Everything but routed
experts is mapped from the files, tensor by tensor, and counts.

Pages of the checkpoint are dropped from the page cache before each run. An expert read again may
still come from there: the machine has more memory than the limit. So the bandwidth in the report is
that of reads as they were, and the bound of `dspark plan` is computed with it. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import describe, finish

from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import PagedExperts
from dspark.base_model.plan import PlanRequest, plan_model
from dspark.base_model.presets import preset
from dspark.engine import Engine
from dspark.models.fetch import cache_root
from dspark.models.text import parse_bytes
from dspark.request import SamplingParams

CONFIG: V4Config = replace(
    preset("v4-tiny"),
    vocab_size=4096,
    hidden_size=2048,
    num_hidden_layers=6,
    num_attention_heads=16,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=512,
    o_lora_rank=256,
    o_groups=4,
    compress_ratios=(0, 4, 128, 4, 128, 4),
    sliding_window=128,
    rope_factor=16.0,
    rope_original=65536,
    max_position_embeddings=1 << 20,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=160,
    num_experts_per_tok=6,
    moe_intermediate_size=1024,
    num_hash_layers=1,
)
PROMPT = tuple(range(100, 132))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Decode within this process; `args.limit` 0 is none, and then the experts are mapped too."""
    if args.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
    before = status("VmRSS")
    start = time.perf_counter()
    memory = args.expert_memory if args.limit else None
    engine = Engine.load(args.folder, "none", exact=False, threads=1, expert_memory=memory)
    loaded = time.perf_counter() - start
    (result,) = engine.generate([PROMPT], SamplingParams(max_tokens=args.tokens, ignore_eos=True))
    stats = result.stats
    out: dict[str, Any] = {
        "token_ids": result.token_ids,
        "dtype": engine.target.info.dtype,
        "seconds to load": round(loaded, 2),
        "seconds of prefill": round(stats.seconds_prefill, 2),
        "tokens per second": round(stats.committed / stats.seconds_verify, 3),
        "RSS before loading": before,
        "peak RSS": status("VmHWM"),
        "of it files, at the end": status("RssFile"),
        "data at the end": status("VmData"),
    }
    experts = engine.target.model.experts  # type: ignore[attr-defined]
    if isinstance(experts, PagedExperts):
        out["paging"] = asdict(experts.stats)
    return out


def run(args: argparse.Namespace, limit: int) -> dict[str, Any]:
    """`decode` in a process of its own, behind a cold page cache."""
    for path in args.folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    words = [sys.executable, __file__, "--child", "--folder", str(args.folder)]
    words += ["--limit", str(limit or "none"), "--expert-memory", str(args.expert_memory)]
    words += ["--tokens", str(args.tokens)]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(child.stderr)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    print({k: v for k, v in found.items() if k != "token_ids"}, file=sys.stderr)
    return found


def plan(args: argparse.Namespace, limited: dict[str, Any]) -> dict[str, Any]:
    """What `dspark plan` expects of this configuration and disk."""
    paging = limited["paging"]
    bandwidth = paging["bytes_read"] / paging["seconds_reading"]
    request = PlanRequest(
        context=len(PROMPT) + args.tokens,
        expert_memory=args.expert_memory,
        disk_bandwidth=bandwidth,
    )
    expected = plan_model(CONFIG, request)
    if expected.paged is None:
        raise AssertionError
    fetched = paging["hits"] + paging["misses"]
    return {
        "read bandwidth as measured, bytes a second": round(bandwidth),
        "bound, tokens a second": round(expected.paged.tokens_per_second or 0, 2),
        "experts in memory, share": round(expected.paged.resident_share, 3),
        "hits, share": round(paging["hits"] / fetched, 3),
        "memory in all": round(expected.paged.resident_bytes),
        "expected bytes missed a token": round(expected.paged.missed_bytes),
    }


def write(folder: Path, shard_bytes: int) -> Path:
    """The checkpoint, unless it is there already."""
    model = folder / "model"
    wanted = plan_model(CONFIG, PlanRequest()).release_bytes
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 1.5 * wanted:
            raise SystemExit(f"{folder} has {free} bytes free, but {1.5 * wanted:.0f} are wanted")
        start = time.perf_counter()
        random_checkpoint(model, CONFIG, shard_bytes=shard_bytes)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return model


def main() -> None:
    """Write, decode twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=cache_root() / "bench-v4-paging")
    parser.add_argument("--limit", default="2GB", help="RLIMIT_DATA")
    parser.add_argument("--expert-memory", default="600MB")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    args.limit = 0 if args.limit == "none" else parse_bytes(args.limit)
    args.expert_memory = parse_bytes(args.expert_memory)
    if args.child:
        print(json.dumps(decode(args)))
        return
    base = args.folder
    args.folder = write(base, parse_bytes(args.shard_size))
    try:
        report = compare(args)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    finish(report, args.out)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both runs and what they say."""
    checkpoint = Checkpoint.open(args.folder)
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    routed = sum(checkpoint.nbytes(f"layers.{i}.ffn.experts.") for i in range(6))
    limited, free = run(args, args.limit), run(args, 0)
    is_same = limited.pop("token_ids") == free.pop("token_ids")
    report = {
        "schema": 1,
        "run": describe(),
        "note": "a shared, noisy machine; files may be read from the page cache",
        "config": CONFIG.to_official(),
        "checkpoint bytes": size,
        "routed experts, bytes": routed,
        "files": len(list(args.folder.glob("*.safetensors"))),
        "RLIMIT_DATA": args.limit,
        "limit / checkpoint": round(args.limit / size, 3),
        "expert memory": args.expert_memory,
        "prompt tokens": len(PROMPT),
        "tokens": args.tokens,
        "limited": limited,
        "peak RSS / checkpoint": round(limited["peak RSS"] / size, 3),
        "without a limit, experts mapped": free,
        "plan": plan(args, limited),
        "same tokens": is_same,
    }
    if not is_same:
        raise SystemExit("the texts differ")
    return report


if __name__ == "__main__":
    main()
