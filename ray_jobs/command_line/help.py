"""The `--help` text of a job, from its config classes and their docstrings."""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import Any

import draccus

from ray_jobs.command_line.settings import default_of, group_of, is_choice, positional_of

_INDENT = " " * 6


def help_text(config_class: type[Any], program: str, description: str) -> str:
    """Usage, then every setting by group with its type, default and meaning."""
    positional = positional_of(config_class)
    first = f" [{positional.upper()}]" if positional else ""
    head = [
        f"usage: {program}{first} [--config_path FILE] [--SETTING VALUE ...]",
        "",
        inspect.cleandoc(description),
        "",
        "  --config_path FILE",
        f"{_INDENT}YAML with any of the settings below (dots are nesting); options override it.",
    ]
    body = list(_group(config_class, "", None))
    most_used = [line for name in getattr(config_class, "most_used", ()) for line in _entry(body, name)]
    return "\n".join([*head, *(["", "Most used:", *most_used] if most_used else []), *body])


def _entry(body: list[str], name: str) -> list[str]:
    """The lines of one setting."""
    start = next(i for i, line in enumerate(body) if line.startswith(f"  --{name} "))
    below = itertools.takewhile(lambda line: line.startswith(_INDENT), body[start + 1 :])
    return [body[start], *below]


def _group(config_class: type[Any], path: str, default: Any) -> Iterator[str]:
    hints = typing.get_type_hints(config_class)
    texts = meanings(config_class)
    inner: list[tuple[str, Any, Any]] = []
    owner = None
    for field, origin in by_origin(config_class):
        name = f"{path}.{field.name}" if path else field.name
        value = getattr(default, field.name) if type(default) is config_class else default_of(field)
        group = group_of(hints[field.name])
        if group is not None:
            inner.append((name, group, value))
            continue
        if origin is not owner:
            yield from ("", _title(config_class, origin, path))
            owner = origin
        yield f"  --{name} {type_text(hints[field.name])}{default_text(value)}"
        yield from _wrapped(texts.get(field.name, ""))
    for name, group, value in inner:
        if is_choice(group):
            yield from _choice(name, group, value)
        else:
            yield from _group(group, name, value)


def _choice(name: str, group: Any, default: Any) -> Iterator[str]:
    choices = group.get_known_choices()
    chosen = f" (default: {group.get_choice_name(type(default))})" if default is not None else ""
    kinds = sorted(choices)
    yield from ("", f"{name}: {_first_line(group)}", f"  --{name}.type {{{','.join(kinds)}}}{chosen}")
    longest = max(map(len, kinds))
    for kind in kinds:
        text = textwrap.wrap(_subject(group, choices[kind]), _width() - len(_INDENT) - longest - 2)
        yield from (f"{_INDENT}{kind if not i else '':<{longest}}  {line}" for i, line in enumerate(text))
    for kind, variant in ((kind, choices[kind]) for kind in kinds):
        yield from list(_group(variant, name, default)) or ("", f"{name}, type {kind}: no settings")


def _title(config_class: type[Any], origin: type[Any], path: str) -> str:
    """Of the fields that `origin` defines, of a variant perhaps: `model.memory, type gru: ...`."""
    bases: tuple[Any, ...] = config_class.__mro__[1:]
    kind = next((f", type {base.get_choice_name(config_class)}" for base in bases if is_choice(base)), "")
    return f"{path}{kind}: {_first_line(origin)}" if path else _first_line(origin)


def by_origin(config_class: type[Any]) -> list[tuple[Any, type[Any]]]:
    """The class's own fields first, inherited ones after them."""
    fields_of_class = []
    for field in fields(config_class):
        bases = reversed(config_class.__mro__)
        origin = next(base for base in bases if field.name in inspect.get_annotations(base))
        fields_of_class.append((field, origin))
    return sorted(fields_of_class, key=lambda pair: config_class.__mro__.index(pair[1]))


def meanings(config_class: type[Any]) -> dict[str, str]:
    """Field name -> text, from the `Attributes:` section of the docstrings, or from one line without a section.

    Several of a text's own, `a, b: text`, share it; `a: text; b: text` has both in a line.
    """
    names = {field.name for field in fields(config_class)}
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, attributes, section = text.partition("Attributes:\n")
        entries = re.split(r"\n(?=    \S)", "\n" + section) if attributes else [" ".join(text.split())]
        for part in (one for entry in entries for one in re.split(r"; (?=\w+: )", entry.strip())):
            listed, colon, meaning = part.partition(": ")
            own = [name.strip() for name in listed.split(",")]
            if colon and (attributes or names.issuperset(own)):
                texts |= dict.fromkeys(own, " ".join(meaning.split()))
    return texts


def _first_line(config_class: type[Any]) -> str:
    return inspect.cleandoc(config_class.__doc__ or config_class.__name__).splitlines()[0]


def _subject(group: Any, variant: type[Any]) -> str:
    """What a choice is, in a line: its module's first, where that has one subject; else the class's own."""
    others = [kind for kind in group.get_known_choices().values() if kind.__module__ == variant.__module__]
    own = _first_line(variant)
    if (len(others) > 1 or group.__module__ == variant.__module__) and not own.startswith("See "):
        return own
    line = inspect.cleandoc(sys.modules[variant.__module__].__doc__ or own).splitlines()[0]
    line = re.sub(r"^(The )?`\w+`( \w+)?: ", "", line)
    return line[0].upper() + line[1:]


def type_text(kind: Any) -> str:
    """A type as a command line shows it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return "|".join(type_text(k) for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    if typing.get_origin(kind) is dict:
        key, value = typing.get_args(kind)
        return f"'{{{type_text(key)}: {type_text(value)}, ...}}'"
    if typing.get_origin(kind) is tuple:
        return f"'[{type_text(typing.get_args(kind)[0])}, ...]'"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{{{','.join(member.name for member in kind)}}}"
    return {bool: "true|false"}.get(kind) or getattr(kind, "__name__", str(kind)).upper()


def default_text(value: Any) -> str:
    """` (default: VALUE)`, nothing for an empty one."""
    if value is None or value in ({}, (), ""):
        return ""
    return f" (default: {str(value).lower() if isinstance(value, bool) else draccus.encode(value)})"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=_INDENT, subsequent_indent=_INDENT)


def _width() -> int:
    return min(100, shutil.get_terminal_size().columns)
