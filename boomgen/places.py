"""Paths on disk and URLs of object stores."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

from upath import UPath

Place: TypeAlias = Path | UPath
T = TypeVar("T")


def is_url(text: str) -> bool:
    """Whether a text names a place by its protocol."""
    return bool(re.match(r"[a-z0-9+]+://", text))


def place(text: str) -> Place:
    """The place of this name."""
    return UPath(text)


def insist(call: Callable[[], T]) -> T:
    """What a call returns, after some tries."""
    return call()
