"""Fixtures shared by all tests: tiny random models of every family."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from dspark.folders import cache_root

# torch and transformers are imported where they are used: pytest loads this file in the process
# that only hands tests out, too, and the others wait for it.
if TYPE_CHECKING:
    import torch

    from dspark.adapters.hf.target import HFTarget

VOCAB = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA4_LAYERS = ["sliding_attention", "full_attention"] * 2


def _config(kind: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**{**_COMMON, **values})


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": partial(_config, "Llama"),
    "mistral": partial(_config, "Mistral", sliding_window=20),
    "phi3": partial(_config, "Phi3"),
    "qwen2": partial(
        _config, "Qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=2
    ),
    "qwen3": partial(_config, "Qwen3", head_dim=32),
    "qwen3_moe": partial(
        _config,
        "Qwen3Moe",
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "gemma2": partial(_config, "Gemma2", head_dim=16, sliding_window=20),
    "gemma3": partial(
        _config, "Gemma3Text", head_dim=32, sliding_window=20, sliding_window_pattern=2
    ),
    "gemma4": partial(
        _config,
        "Gemma4Text",
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=32,
        sliding_window=20,
        num_kv_shared_layers=2,
        layer_types=_GEMMA4_LAYERS,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB,
    ),
}

_PROBES = "DSPARK_TEST_PROBES"
_KERNELS = cache_root() / "kernels"
_SEEDS = random.Random(0)

# "fixed" tries the same examples at every run, so that a change is what makes a test fail; "random"
# looks for new ones: HYPOTHESIS_PROFILE=random.
_FIXED = "fixed"
settings.register_profile(_FIXED, max_examples=25, deadline=None, derandomize=True)
settings.register_profile("random", max_examples=300, deadline=None, print_blob=True)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", _FIXED)
settings.load_profile(_PROFILE)


def examples(fixed: int, random: int) -> settings:
    """Settings of a property that is dear: so many examples in either profile."""
    return settings(max_examples=fixed if _PROFILE == _FIXED else random, deadline=None)


# Any character but half a pair. `st.characters` first makes a table of all of Unicode, for seconds.
CHARACTERS = st.integers(0, 0x10FFFF - 0x800).map(lambda n: chr(n if n < 0xD800 else n + 0x800))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models run faster on one thread, and do not fight over cores."""
    if "DSPARK_TEST_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)


@functools.cache
def _measure_briefly() -> None:
    """Let loading spend little on what a step costs, which decides about speed alone.

    It takes two seconds for every target that is new to it, most of the time of many a test; what
    exact mode costs a step takes half of its check.
    """
    from dspark import exactness
    from dspark.eval import profile_auto

    profile_auto.quick_profile = functools.partial(profile_auto.quick_profile, seconds=0.05)
    exactness.measure_cost = functools.partial(exactness.measure_cost, repeats=4)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test begins with the same random numbers, whichever ran before it in its process.

    Requests without a seed get theirs from `secrets`, which is made to tell the same every time.
    """
    if item.get_closest_marker("real") is None:
        _measure_briefly()
    random.seed(0)
    _SEEDS.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of a session share what they find out about exact mode."""
    secrets.randbits = _SEEDS.getrandbits
    if _PROBES not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="dspark-probes-")
        os.environ[_PROBES] = folder.name  # of which the processes that xdist starts have a copy
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(_PROBES))


def pytest_sessionstart() -> None:
    """Every other process imports the test files from the last to the first.

    In a new checkout most of the time before the first test goes to compiling them, and what one
    process has compiled the others only read.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    if not int(number) % 2:
        return
    root = Path(__file__).parents[1]
    for path in sorted(root.glob("tests/**/test_*.py"), reverse=True):
        # Collection meets the same error, and says it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def probe_folder() -> Path | None:
    """Where wrapped models keep what was found about their exactness, for the whole session.

    Whoever uses it must give `wrap_model` a fingerprint that tells its weights from others'.
    """
    folder = os.environ.get(_PROBES)
    return None if folder is None else Path(folder)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the module's own, but for what loading finds out about machine and weights.

    Weights written by different tests are checked once a session if they, and the times of their
    files, are the same (tests.test_cli.save_model). Compiled kernels, named by their contents, are
    the user's own: compiling takes seconds for each.
    """
    folder = tmp_path_factory.mktemp("cache")
    (folder / "dspark").mkdir()
    shared = {"probes": (probe_folder() or folder) / "shared-probes", "kernels": _KERNELS}
    for name, target in shared.items():
        target.mkdir(parents=True, exist_ok=True)
        (folder / "dspark" / name).symlink_to(target, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def random_model(
    family: str, dtype: torch.dtype | None = None, *, layers: int | None = None
) -> Any:
    """A transformers model with random weights large enough that every branch matters.

    Args:
        family: One of FAMILIES.
        dtype: Of the weights, None for float32.
        layers: Keep so many of its layers, None for all. Where layers are alike it
            may also have more.
    """
    import torch
    import transformers

    config = FAMILIES[family]()
    if layers is not None and layers > config.num_hidden_layers:
        config = FAMILIES[family](num_hidden_layers=layers)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    if layers is not None:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[:layers]
        model.config.num_hidden_layers = layers
    return model.to(dtype or torch.float32).eval()


@functools.cache
def random_target(
    family: str = "llama",
    dtype: torch.dtype | None = None,
    *,
    exact: bool | None = None,
    layers: int | None = None,
) -> HFTarget:
    """A wrapped random model; made once per combination, its exactness found out once a session."""
    from dspark.adapters.hf.load import adapter_for, wrap_model
    from dspark.registry import LoadOptions

    model = random_model(family, dtype, layers=layers)
    options = LoadOptions(name=f"random-{family}", exact=exact, probe_folder=probe_folder())
    return wrap_model(
        model,
        adapter_for(model.config.model_type),
        options,
        eos_token_ids=(2,),
        fingerprint=f"random_model {family} {layers}",
    )
