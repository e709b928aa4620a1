"""What an instruction is measured against: other words for the same, and opposites that the same scene allows.

A set is a YAML file. Those of this folder are of the suites that they are named for:

    one_scene: true                        # demonstrations of all of them begin in one scene; by default false
    instructions:
      put the bowl on the plate:
        also: [put the bowl onto a plate]    # how demonstrations say it as well
        action: [place the bowl on the plate]
        object: [put the dish on the plate]
        opposites: [put the bowl on the stove]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ipvla.choices import did_you_mean
from ipvla.files import one_line
from ipvla.plain_yaml import YamlError, load_file

_FOLDER: Final = Path(__file__).parent
#: What a paraphrase says in other words: what is to be done, or with what.
DIFFICULTIES: Final = ("action", "object")
_FIELDS: Final = ("also", *DIFFICULTIES, "opposites")


class InstructionsError(ValueError):
    """A file is no set of instructions, or has none for what was asked."""


@dataclass(frozen=True)
class Wording:
    """One instruction.

    Attributes:
        instruction: its name in results.
        also: other texts that demonstrations have for it.
        synonyms: of `DIFFICULTIES` -> texts that mean the same.
        opposites: texts that demand something else, and could be done in the same scene; at least one.
    """

    instruction: str
    also: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]]
    opposites: tuple[str, ...]

    @property
    def all_synonyms(self) -> tuple[str, ...]:
        return tuple(text for texts in self.synonyms.values() for text in texts)


@dataclass(frozen=True)
class InstructionSet:
    """Of one file.

    Attributes:
        path: the file's.
        wordings: in its order.
        one_scene: demonstrations of all its instructions begin in the same scene, up to small shifts.
    """

    path: Path
    wordings: tuple[Wording, ...]
    one_scene: bool = False

    def find(self, text: str) -> Wording | None:
        """The wording that a demonstration's text belongs to, whatever its case and spaces; None for none."""
        plain = _plain(text)
        for wording in self.wordings:
            if plain in map(_plain, (wording.instruction, *wording.also)):
                return wording
        return None

    @property
    def fingerprint(self) -> str:
        """Twelve characters that other words do not have."""
        said = [(one.instruction, one.also, dict(one.synonyms), one.opposites) for one in self.wordings]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]

    @classmethod
    def load(cls, path: Path) -> Self:
        """The set of a file.

        Raises:
            InstructionsError: it cannot be read, or is no set; an instruction has no opposites or no synonyms.
        """
        try:
            content = load_file(path)
        except (OSError, YamlError) as error:
            raise InstructionsError(f"{path} is no set of instructions ({one_line(error)})") from None
        if not isinstance(content, dict) or not isinstance(content.get("instructions"), dict):
            raise InstructionsError(f"{path} has no map `instructions`; see ipvla/sim/instructions for examples")
        if strange := [name for name in content if name not in ("one_scene", "instructions")]:
            raise InstructionsError(f"{path}: {strange[0]!r} is neither one_scene nor instructions")
        one_scene = content.get("one_scene", False)
        if not isinstance(one_scene, bool):
            raise InstructionsError(f"{path}: one_scene is {one_scene!r}; give true or false")
        given = content["instructions"]
        wordings = tuple(_wording(path, str(instruction), fields) for instruction, fields in given.items())
        if not wordings:
            raise InstructionsError(f"{path}: `instructions` is empty; give at least one")
        made = cls(path, wordings, one_scene)
        for wording in wordings:
            same = [text for text in wording.opposites if made.find(text) is wording]
            if same or set(map(_plain, wording.opposites)) & set(map(_plain, wording.all_synonyms)):
                raise InstructionsError(f"{path}: an opposite of {wording.instruction!r} means the same")
        return made


def known_sets() -> tuple[str, ...]:
    """The suites that have a set in this folder."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def instruction_set(suite: str) -> InstructionSet:
    """The set of a suite. InstructionsError if it has none here."""
    if suite not in known_sets():
        raise InstructionsError(f"suite {suite} has no set of instructions; {did_you_mean(suite, known_sets())}")
    return InstructionSet.load(_FOLDER / f"{suite}.yaml")


def set_for(texts: Collection[str]) -> InstructionSet:
    """Of this folder's sets the one that knows most of these texts. InstructionsError if none knows any."""
    sets = [instruction_set(suite) for suite in known_sets()]
    best = max(sets, key=lambda one: sum(one.find(text) is not None for text in texts))
    if not any(best.find(text) for text in texts):
        example = min(texts, default="")
        raise InstructionsError(
            f"no set of ipvla/sim/instructions knows instructions such as {example!r}; write one for these "
            "data and give it as --instructions FILE"
        )
    return best


def _wording(path: Path, instruction: str, given: Any) -> Wording:
    if not isinstance(given, dict):
        raise InstructionsError(f"{path}: {instruction!r} has no map of {', '.join(_FIELDS)}")
    if strange := [str(name) for name in given if name not in _FIELDS]:
        raise InstructionsError(f"{path}: {instruction!r} has {strange[0]!r}; {did_you_mean(strange[0], _FIELDS)}")
    texts = {name: tuple(_texts(path, instruction, name, given.get(name))) for name in _FIELDS}
    if not texts["opposites"]:
        raise InstructionsError(
            f"{path}: {instruction!r} has no opposites; give one that the same scene allows, or leave it out"
        )
    synonyms = {name: texts[name] for name in DIFFICULTIES if texts[name]}
    if not synonyms:
        raise InstructionsError(f"{path}: {instruction!r} has no synonyms; give some as action or object")
    return Wording(instruction, texts["also"], synonyms, texts["opposites"])


def _texts(path: Path, instruction: str, name: str, given: Any) -> Iterator[str]:
    if given is not None and not isinstance(given, list):
        raise InstructionsError(f"{path}: {name} of {instruction!r} is no list of texts")
    for text in given or ():
        if not isinstance(text, str) or not text.strip():
            raise InstructionsError(f"{path}: {name} of {instruction!r} holds {text!r}, which is no text")
        yield " ".join(text.split())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
