"""Every setting of every job in one file, so that `ipvla` knows a name, and `ipvla help` a meaning, at once.

Importing a job takes seconds: torch, Ray and transformers come with it. `python -m benchmarks.tables` writes the
file, and docs/settings.md; a test sees to it that both are as the config classes are.
"""

from __future__ import annotations

import json
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from ipvla.choices import nearest
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.help import by_origin, default_text, meanings, type_text
from ray_jobs.command_line.jobs import JOBS, config_class, named, split
from ray_jobs.command_line.settings import CONFIG_PATH, default_of, group_of, is_choice, no_such_setting

FILE: Final = Path(__file__).with_name("settings.json")
PAGE: Final = SOURCE_TREE / "docs" / "settings.md"
#: Longest list that `found` gives.
_MOST: Final = 30


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted.
        of: the choice that has it, `model.memory.type gru` say; "" if it is there whatever is chosen.
        type, default, text: as `--help` writes them.
        jobs: that take it.
    """

    name: str
    of: str
    type: str
    default: str
    text: str
    jobs: tuple[str, ...]

    def lines(self) -> str:
        """Name, type, default, jobs, and the text below."""
        jobs = "every job" if len(self.jobs) == len(JOBS) else f"ipvla {', '.join(self.jobs)}"
        head = f"--{self.name} {self.type}{self.default}"
        where = f"{jobs}{f', with --{self.of}' if self.of else ''}"
        return "\n".join(
            [head, *(textwrap.indent(part, "    ") for part in (where, *textwrap.wrap(self.text, 76)))]
        )


def collected() -> list[Setting]:
    """From the config classes of all jobs, which are imported."""
    known: dict[tuple[str, ...], Setting] = {}
    for job in JOBS:
        for one in _settings(config_class(job), "", "", None):
            key = (one.name, one.of, one.type, one.default, one.text)
            earlier = known[key].jobs if key in known else ()
            # two choices of a job may each have it
            known[key] = replace(one, jobs=earlier if job in earlier else (*earlier, job))
    return list(known.values())


def _settings(config: type[Any], path: str, of: str, default: Any) -> Iterator[Setting]:
    hints, texts = typing.get_type_hints(config), meanings(config)
    for field, _ in by_origin(config):
        name, group = f"{path}{field.name}", group_of(hints[field.name])
        value = getattr(default, field.name) if type(default) is config else default_of(field)
        if group is None:
            kind = type_text(hints[field.name])
            shown = default_text(value).replace(f"{SOURCE_TREE}/", "").replace(str(SOURCE_TREE), "the source tree")
            yield Setting(name, of, kind, shown, texts.get(field.name, ""), ())
        elif is_choice(group):
            variants = group.get_known_choices()
            chosen = default_text(group.get_choice_name(type(value)) if value is not None else None)
            kinds = f"{{{','.join(sorted(variants))}}}"
            yield Setting(f"{name}.type", of, kinds, chosen, texts.get(field.name, ""), ())
            for kind in sorted(variants):
                yield from _settings(variants[kind], f"{name}.", f"{name}.type {kind}", value)
        else:
            yield from _settings(group, f"{name}.", of, value)


@cache
def settings() -> tuple[Setting, ...]:
    """As the file has them; nothing is imported."""
    return tuple(Setting(**{**one, "jobs": tuple(one["jobs"])}) for one in json.loads(FILE.read_text()))


def unknown(job: str, arguments: Iterable[str]) -> str | None:
    """What to say of the first option that the job does not have; None if it has all.

    What belongs to another choice than the one that is made is the job's own to find. Of `submit`, the options of
    the job behind `--` are looked at too.
    """
    if job == "submit":
        arguments, behind = split(list(arguments))
        submitted, given = named(behind) if behind else ("", [])
        if submitted in JOBS and (problem := unknown(submitted, given)) is not None:
            return problem
    names = [one.name for one in settings() if job in one.jobs]
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        if not word.startswith("--") or name in ("help", CONFIG_PATH, *names):
            continue
        if any(name.startswith(f"{one}.") for one in names):  # of a mapping
            continue
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            dotted = ".".join(parts[:end])
            if dotted not in names and not any(one.startswith(f"{dotted}.") for one in names):
                return no_such_setting(dotted, names)
    return None


def found(words: Sequence[str]) -> list[Setting]:
    """What has all these words in its name; else in its text; else in a name like the first."""
    low = [word.lower().lstrip("-") for word in words]
    exact = [one for one in settings() if [one.name] == low]
    named = [one for one in settings() if all(word in one.name.lower() for word in low)]
    told = [one for one in settings() if all(word in f"{one.name} {one.of} {one.text}".lower() for word in low)]
    like = nearest(low[0], {one.name.rpartition(".")[2] for one in settings()}, 3, 0.7)
    return exact or named or told or [one for one in settings() if one.name.rpartition(".")[2] in like]


def answer(words: Sequence[str]) -> tuple[str, int]:
    """What `ipvla help WORD ...` prints, and its exit code."""
    matches = found(words)
    if not matches:
        return f"no setting has {' '.join(words)!r} in its name or its text; ipvla JOB --help lists a job's", 2
    shown = [one.lines() for one in matches[:_MOST]]
    rest = len(matches) - len(shown)
    return "\n\n".join([*shown, *([f"and {rest} more; give another word"] if rest else [])]), 0


def page(every: Sequence[Setting]) -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting of every job. `ipvla help WORD` finds one, `ipvla JOB --help` shows a job's. This page is",
        "generated from the config classes by `python -m benchmarks.tables`.",
    ]
    groups: dict[str, list[Setting]] = {}
    for one in every:
        groups.setdefault(one.name.rpartition(".")[0], []).append(one)
    for group, members in groups.items():
        lines += ["", f"## {group or 'Without a group'}", "", "| setting | type and default | jobs | meaning |"]
        lines += ["|---|---|---|---|"]
        lines += [_row(one) for one in members]
    return "\n".join(lines) + "\n"


def _row(one: Setting) -> str:
    jobs = "all" if len(one.jobs) == len(JOBS) else ", ".join(one.jobs)
    of = f" (`{one.of.rpartition('.type ')[2]}`)" if one.of else ""
    cells = [f"`{one.name}`{of}", f"`{one.type}`{one.default}", jobs, one.text]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def as_file(every: Sequence[Setting]) -> str:
    """The file's text: one setting a line."""
    rows: list[Mapping[str, Any]] = [asdict(one) for one in every]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def generated() -> dict[Path, str]:
    """The index and docs/settings.md as they should be; imports all jobs."""
    every = collected()
    return {FILE: as_file(every), PAGE: page(every)}
