"""A model larger than the memory it may use, through the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dspark import SamplingParams
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.presets import preset
from dspark.engine import Engine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA covers such memory on Linux only"
)

CONFIG = replace(
    preset("v4-tiny"), hidden_size=1024, moe_intermediate_size=512, n_routed_experts=48
)
BUDGET = 24_000_000

CHILD = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from dspark import SamplingParams
from dspark.engine import Engine
from dspark.errors import CheckpointError
folder, budget, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = {"draft": "none", "exact": False, "dtype": "float32"}
engine = Engine.load(folder, expert_memory=budget, **options)
mapped = Engine.load(folder, **options)
lines = open("/proc/self/status").read().splitlines()
data = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
prompt, params = list(range(9, 25)), SamplingParams(max_tokens=8)
(result,) = engine.generate([prompt], params)
stats = engine.target.model.experts.stats
try:
    mapped.generate([prompt], params)
    sys.exit("the limit does not bite")
except CheckpointError as exc:
    print(json.dumps([result.token_ids, stats.bytes_read, stats.bytes_held, str(exc)]))
"""


@pytest.mark.slow
def test_a_model_larger_than_memory_gives_the_text_it_gives_with_all_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    random_checkpoint(folder, CONFIG)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    room = BUDGET + 40_000_000
    assert size > 3 * room
    words = [sys.executable, "-c", CHILD, str(folder), str(BUDGET), str(room)]
    # One arena: what malloc sets aside for other threads would count against the limit.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    tokens, read, held, error = json.loads(run.stdout)
    engine = Engine.load(folder, "none", exact=False, dtype="float32")
    (free,) = engine.generate([list(range(9, 25))], SamplingParams(max_tokens=8))
    assert tokens == free.token_ids
    assert read > 3 * BUDGET >= 3 * held
    # Without the budget the experts are mapped, and do not fit.
    assert "cannot be mapped into memory" in error
