"""Reasoning in text, in the tag format of Embodied Chain-of-Thought (ECoT; Zawalski et al., arXiv 2407.08693).

`PLAN: press red SUBTASK: 1 press red` names each part by an upper-case tag and a colon; parts may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

#: In the order in which ECoT's published generator writes them (github.com/MichalZawalski/embodied-CoT); what
#: follows them there is the action.
TAGS = (
    "TASK",
    "PLAN",
    "VISIBLE OBJECTS",
    "SUBTASK REASONING",
    "SUBTASK",
    "MOVE REASONING",
    "MOVE",
    "GRIPPER POSITION",
)
#: What a policy acts on: these say nothing when they are empty.
_NEVER_EMPTY = ("PLAN", "SUBTASK")
#: Case and a space before the colon do not count: tokenizers lower-case and separate.
_TAG = re.compile(rf"\b({'|'.join(TAGS)}) ?:", re.ASCII | re.IGNORECASE)


class ReasoningError(ValueError):
    """A text is no reasoning in ECoT's format; the message says why."""


class Reasoning(Mapping[str, str]):
    """Tags, of `TAGS`, to what is said under each, in the order of the text; equal if tags and texts are.

    Args:
        parts: runs of white space in a text become one space.

    Raises:
        ReasoningError: there are no parts, a tag is unknown, PLAN or SUBTASK is empty, or a text has a tag within.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        self._parts = {tag: _one_line(text) for tag, text in parts.items()}
        if not parts:
            raise ReasoningError(f"a reasoning without parts; give at least one of {', '.join(TAGS)}")
        for tag, text in self._parts.items():
            if tag not in TAGS:
                raise ReasoningError(f"unknown tag {tag!r}; use one of {', '.join(TAGS)}")
            if not text and tag in _NEVER_EMPTY:
                raise ReasoningError(f"{tag} is empty; say something after '{tag}:' or leave the tag out")
            if found := _TAG.search(text):
                raise ReasoningError(f"{tag} reads {text!r}, with the tag {found[0]!r} within; word it otherwise")

    def __getitem__(self, tag: str) -> str:
        return self._parts[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Reasoning({self._parts})"

    def format(self) -> str:
        """The text, on one line: what `parse` reads."""
        return " ".join(f"{tag}: {text}".strip() for tag, text in self._parts.items())


def parse(text: str) -> Reasoning:
    """The reasoning that `text` spells, `TAG: text TAG: text`.

    Raises:
        ReasoningError: no known tag, words before the first one, a tag twice, or an empty PLAN or SUBTASK.
    """
    before, *pieces = _TAG.split(_one_line(text))
    if not pieces:
        raise ReasoningError(f"no tag in {text!r}; write 'TAG: text' with tags of {', '.join(TAGS)}")
    if before:
        raise ReasoningError(
            f"{text!r} has {before.strip()!r} before its first tag; begin with one of {', '.join(TAGS)}"
        )
    tags = [tag.upper() for tag in pieces[::2]]
    for tag in tags:
        if tags.count(tag) > 1:
            raise ReasoningError(f"{text!r} has the tag {tag} {tags.count(tag)} times; give it once")
    return Reasoning(dict(zip(tags, pieces[1::2], strict=True)))


def without_last_part(text: str) -> str:
    """`text` without its last tag and what is said under it; "" if there is one tag or none."""
    *_, last = [0, *(found.start() for found in _TAG.finditer(text))]
    return text[:last].rstrip()


def _one_line(text: str) -> str:
    return " ".join(text.split())
