"""YAML of plain values alone. No tag makes an object or reads another file; what is read is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from ipvla.files import foreign, one_line, read_text

#: Bytes of a file, and values in it once its aliases are written out.
_LARGEST: Final = 2**20
_MOST_VALUES: Final = 100_000


class YamlError(ValueError):
    """A text is not YAML of plain values."""


def load(text: str) -> Any:
    """The value that a text stands for. YamlError if it is none."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise YamlError(f"more than {_MOST_VALUES} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise YamlError(_reason(error)) from None
    finally:
        loader.dispose()


def load_file(path: Path) -> Any:
    """The value that a file stands for.

    Raises:
        OSError: it cannot be read.
        YamlError: it is no YAML of plain values.
    """
    try:
        text = read_text(path, _LARGEST)
    except ValueError as error:
        raise YamlError(one_line(error)) from None
    if what := foreign(text.encode()):  # some would be YAML
        raise YamlError(what)
    return load(text)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, yaml.constructor.ConstructorError) and "constructor for the tag" in str(error):
        return f"{str(error.problem).rpartition(' ')[2]} is a tag; only plain values are read"
    return one_line(error)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out. YamlError if it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1  # while its inside is looked at
        inner = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(one, known) for one in inner)
    if known[id(node)] < 0:
        raise YamlError("a value that holds itself")
    return known[id(node)]
