"""Settings of a server: its limits, keys and names."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import ConfigError

__all__ = ["ServeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of a server.

    Attributes:
        model: The model's name in the API.
        api_keys: Keys of which a client must send one; none asks for no key.
        max_queue: Choices that may wait beside those that run, before new requests get a 429.
        max_body: Bytes of a request's body at the most.
        max_prompt_tokens: Tokens of a prompt at the most, None for what the model takes.
        max_tokens: Tokens that a request may ask for, None for the model's context.
        max_choices: Choices that a request may ask for: its prompts times its n.
        request_timeout: Seconds that a request may take, its time in the queue included.
        drain_seconds: Seconds that running requests have to finish after a signal to stop.
        cors_origins: Origins of web pages that may use the server; none by default.
        hosts: Host names that clients may call the server by; none allows all.
        is_metrics_open: Show /metrics without a key.

    Raises:
        ConfigError: If a value is out of range.
    """

    model: str
    api_keys: tuple[str, ...] = ()
    max_queue: int = 64
    max_body: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 16
    request_timeout: float = 600.0
    drain_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    is_metrics_open: bool = False

    def __post_init__(self) -> None:
        least = {
            "max_queue": 0,
            "max_body": 1,
            "max_prompt_tokens": 1,
            "max_tokens": 1,
            "max_choices": 1,
            "drain_seconds": 0,
        }
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and not value >= limit:
                raise ConfigError(f"{name} is {value}, but must be >= {limit}.")
        if not self.request_timeout > 0:
            raise ConfigError(f"request_timeout is {self.request_timeout}, but must be > 0.")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty.", hint="leave out --api-key to ask for none")
        if not self.model:
            raise ConfigError("the model's name is empty.")
