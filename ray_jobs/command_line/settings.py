"""Reads a job's settings: a YAML file, then `--dotted.name value` options over it, decoded by draccus.

draccus's own command line is not used: it knows no `--group.key` for mappings, loses which field was wrong, and
cannot read attribute documentation from a class's docstring.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import draccus
from draccus.utils import DecodingError, ParsingError

from ipvla import plain_yaml
from ipvla.choices import did_you_mean, nearest
from ipvla.plain_yaml import YamlError

Config = TypeVar("Config")
CONFIG_PATH = "config_path"


class SettingError(ValueError):
    """A setting cannot be used as it was given; the message names it, the value, and what to do."""


class _UnknownSettingError(SettingError):
    """No setting is called `dotted`; its group has those that are `known`."""

    def __init__(self, dotted: str, known: tuple[str, ...]) -> None:
        super().__init__(dotted)
        self.dotted, self.known = dotted, known


class _Text(str):
    """A value from the command line, which is read once the type of its setting is known."""


#: Stands for the value of an option without one, which is right for `true|false` only. No argument can hold it.
_BARE = "\0"


def parse(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for.

    Args:
        config_class: may name one of its settings in a class variable `positional`.
        arguments: `--config_path file.yaml` and `--name value`, `--group.name value` or `--name=value`; a setting
            that is true or false may stand alone. The value of the `positional` one may come first, without name.

    Raises:
        SettingError: an unknown name, a value that does not fit, or values that the config class refuses.
    """
    overrides = _given(_with_positional(config_class, arguments))
    tree = _load(overrides.pop(CONFIG_PATH)) if CONFIG_PATH in overrides else {}
    return _with(config_class, tree, overrides, None)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with these values, by dotted name (`{"optimizer.lr": 1e-3}`), checked as `parse` checks them.

    Raises:
        SettingError: an unknown name, a value that does not fit, or values that the config class refuses.
    """
    return _with(type(config), {}, values, config)


def _with(
    config_class: type[Config], tree: dict[str, Any], values: Mapping[str, Any], default: Config | None
) -> Config:
    for name, value in values.items():
        _insert(tree, name.split("."), value)
    try:
        tree = _checked(config_class, tree, "", default)
    except _UnknownSettingError as error:
        names = [name for name, _ in options(config_class)]
        raise SettingError(no_such_setting(error.dotted, names, error.known)) from None
    try:
        return draccus.decode(config_class, tree)  # type: ignore[no-any-return]
    except ParsingError as error:
        raise SettingError(_reason(error, config_class, tree)) from error


def arguments(values: Mapping[str, Any]) -> list[str]:
    """The command line that sets these values, by dotted name."""
    return [
        part
        for name, value in values.items()
        for part in (f"--{name}", str(value) if isinstance(value, str | Path) else json.dumps(value))
    ]


def positional_of(config_class: type[Any]) -> str | None:
    """The setting whose value may come first on the command line, without its name; None if there is none."""
    name: str | None = getattr(config_class, "positional", None)
    return name


def group_of(kind: Any) -> Any:
    """The config class behind a field's type (`LoRAConfig | None` -> LoRAConfig), or None for a plain value."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(filter(None, map(group_of, typing.get_args(kind))), None)
    return kind if isinstance(kind, type) and (is_dataclass(kind) or is_choice(kind)) else None


def is_choice(kind: Any) -> bool:
    """Is this a class whose variants are chosen by `type`?"""
    return isinstance(kind, type) and issubclass(kind, draccus.ChoiceRegistry) and not _is_variant(kind)


def _is_variant(kind: Any) -> bool:
    return kind in kind.get_known_choices().values()


def default_of(field: Field[Any]) -> Any:
    """A field's default value, or None."""
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def options(config: type[Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting; of a choice those of all its variants, each name once."""
    seen: set[str] = set()
    for name, kind in _options(config, path):
        if name not in seen:
            seen.add(name)
            yield name, kind


def _options(config: type[Any], path: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config)
    for field in fields(config):
        name, group = f"{path}{field.name}", group_of(hints[field.name])
        if group is None:
            yield name, hints[field.name]
        elif is_choice(group):
            variants = group.get_known_choices()
            yield f"{name}.type", typing.Literal[tuple(variants)]
            for variant in variants.values():
                yield from _options(variant, f"{name}.")
        else:
            yield from _options(group, f"{name}.")


def no_such_setting(dotted: str, names: Sequence[str], known: Sequence[str] | None = None) -> str:
    """What to say of a name that none of these dotted names is: the nearest of its group, then of all.

    `known`: what the group has; by default what the names say.
    """
    group, _, name = dotted.rpartition(".")
    below = f"{group}." if group else ""
    inside = (one.removeprefix(below).partition(".")[0] for one in names if one.startswith(below))
    known = list(dict.fromkeys(inside)) if known is None else known
    siblings = {one: f"{below}{one}" for one in known}
    others: dict[str, str] = {}
    for one in names:
        others.setdefault(one.rpartition(".")[2], one)
    for choices, likeness in ((siblings, 0.5), (others, 0.75)):
        close = nearest(name, choices, likeness=likeness)
        if close and choices[close[0]] != dotted:
            return f"{dotted}: there is no such setting; did you mean {choices[close[0]]!r}?"
    return f"{dotted}: there is no such setting; {did_you_mean(name, known)}"


def _with_positional(config_class: type[Any], arguments: Sequence[str]) -> list[str]:
    name = positional_of(config_class)
    if name is None or not arguments or arguments[0].startswith("--"):
        return list(arguments)
    return [f"--{name}={arguments[0]}", *arguments[1:]]


def _given(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise SettingError(f"argument {word!r} is not an option; settings are given as --name value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else _BARE
        options[name] = _Text(text)
    return options


def _load(path: str) -> dict[str, Any]:
    if path == _BARE:
        raise SettingError(f"{CONFIG_PATH}: no file was given; write --{CONFIG_PATH} FILE")
    try:
        tree = plain_yaml.load_file(Path(path))
    except OSError as error:
        raise SettingError(f"{CONFIG_PATH}: {path} cannot be read ({error.strerror}); give a YAML file") from None
    except YamlError as error:
        raise SettingError(f"{CONFIG_PATH}: {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict | None):
        raise SettingError(f"{CONFIG_PATH}: {path} holds {tree!r:.60}; it must hold `name: value` lines")
    if strange := [name for name in tree or {} if not isinstance(name, str)]:
        raise SettingError(f"{CONFIG_PATH}: {path} names a setting {strange[0]!r:.60}; names are texts")
    return tree or {}


def _insert(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def _checked(kind: Any, value: Any, path: str, default: Any) -> Any:
    """`value` with command line texts read; a group that is given in part is completed from its default."""
    group = group_of(kind)
    if group is None:
        return _plain(kind, value, path)
    if isinstance(value, _Text):
        value = _read(Any, value, path)
    if value is None and group is not kind:
        return None
    if not isinstance(value, Mapping):
        raise SettingError(
            f"{path}: {value!r} is not a group of settings; give its fields, as in --{path}.NAME VALUE"
        )
    chosen = _variant(group, value, path, default) if is_choice(group) else group
    hints = typing.get_type_hints(chosen)
    known = {field.name: field for field in fields(chosen) if field.init}
    tree: dict[str, Any] = {}
    if type(default) is chosen:
        tree |= draccus.encode(default)
    for name, given in value.items():
        dotted = f"{path}.{name}" if path else str(name)
        if name in known:
            inner = getattr(default, name) if type(default) is chosen else default_of(known[name])
            tree[name] = _checked(hints[name], given, dotted, inner)
        elif name != "type" or not is_choice(group):
            raise _UnknownSettingError(dotted, tuple(known))
    return tree | {"type": group.get_choice_name(chosen)} if is_choice(group) else tree


def _variant(group: Any, value: Mapping[str, Any], path: str, default: Any) -> Any:
    choices = group.get_known_choices()
    if "type" in value:
        if value["type"] not in choices:
            remedy = did_you_mean(str(value["type"]), choices)
            also = "" if remedy.startswith("choose") else f" (choices: {', '.join(choices)})"
            raise SettingError(f"{path}.type: {value['type']!r} is unknown; {remedy}{also}")
        return choices[value["type"]]
    if default is None:
        raise SettingError(f"{path}.type: it is missing; choose one of: {', '.join(choices)}")
    return type(default)


def _plain(kind: Any, value: Any, path: str) -> Any:
    value = _read(kind, value, path)
    if value is None and kind in (str, Path, int, float, bool):
        raise SettingError(f"{path}: it has no value; give one, or leave it out")
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        for name, inner in value.items():
            if inner is None:
                raise SettingError(
                    f"{path}: {name!r} has no value; YAML wants a blank after the colon, `name: value`"
                )
    return value


def _read(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _read(Any, inner, f"{path}.{name}") for name, inner in value.items()}
    if not isinstance(value, _Text):
        return value
    if value == _BARE:
        if kind is not bool:
            raise SettingError(f"{path}: no value was given; write --{path} VALUE")
        return True
    if kind is str or kind is Path:
        return str(value)
    try:
        return plain_yaml.load(str(value)) if value else ""
    except YamlError as error:
        raise SettingError(f"{path}: {str(value)!r} is not valid YAML; quote it, or correct it") from error


def _reason(error: BaseException, config_class: Any, tree: Mapping[str, Any]) -> str:
    """The config class's message, else the field that draccus could not read."""
    reason = str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, DecodingError) and link.key_path:
            reason = _misfit(link, config_class, tree)
        elif isinstance(link, DecodingError):
            reason = link.message
        elif isinstance(link, ParsingError) and isinstance(link.__cause__, ValueError | TypeError):
            return str(link.__cause__)  # raised by __post_init__, which names the field itself
        link = link.__cause__
    return reason


def _misfit(error: DecodingError, config_class: Any, tree: Mapping[str, Any]) -> str:
    """The value at the error's path, and the type of the setting that it was meant for."""
    path = [str(key) for key in error.key_path]
    kind, value = config_class, tree
    for name in path:
        value = value.get(name, value) if isinstance(value, Mapping) else value
        group = group_of(kind)
        if group is not None and is_dataclass(group):
            kind = typing.get_type_hints(group).get(name, kind)
    expected = kind.__name__ if typing.get_origin(kind) is None and isinstance(kind, type) else kind
    return f"{'.'.join(path)}: {value!r} is not of type {expected}; --help explains it"
