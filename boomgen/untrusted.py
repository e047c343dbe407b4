"""Reading what strangers wrote: text for a terminal, JSON and YAML that cost no more than their length."""

import json
from typing import Any

import yaml

MAX_YAML = 2**20  # characters
MAX_DEPTH = 32


def printable(text: str) -> str:
    """Text that a terminal shows as it is: control characters, also those that turn the writing, are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def read_json(data: bytes | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none, or nested beyond reason.
    """
    try:
        return json.loads(data)
    except RecursionError as err:
        raise ValueError("nested too deep") from err


def read_yaml(text: str) -> Any:
    """A YAML value of plain types. Aliases are refused: nine lines of them can stand for a billion values.

    Raises:
        ValueError: it is none, holds an alias or a tag of a program's type, is too long, or nested beyond reason.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text)} characters of YAML, at most {MAX_YAML} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"an alias, *{event.anchor}; write out what it stands for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError("nested too deep")
        return yaml.load(text, Loader=loader)
    except ValueError:
        raise
    except Exception as err:  # besides YAMLError, whatever the constructors of odd scalars raise
        raise ValueError(" ".join(str(err).split()) or type(err).__name__) from err
