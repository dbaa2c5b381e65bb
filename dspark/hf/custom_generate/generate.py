"""The decoding method of a `custom_generate` folder: speculative decoding by dspark."""

from typing import Any

from dspark.hf import hub_generate


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """Generate with dspark; takes `dspark_draft` beside the arguments of transformers' generate."""
    return hub_generate(model, *args, **kwargs)
