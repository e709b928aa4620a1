"""README.md and docs/: their commands, options and presets exist, links lead somewhere, the text is short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.index import PAGE as SETTINGS
from ray_jobs.command_line.index import unknown
from ray_jobs.command_line.jobs import JOBS, module, named
from ray_jobs.command_line.settings import SettingError, parse

PAGES = [SOURCE_TREE / "README.md", *sorted(set((SOURCE_TREE / "docs").glob("*.md")) - {SETTINGS})]
#: Without generated tables and docs/settings.md; a page that grows is a page to shorten.
MOST_WORDS = 14_000
MODULES = {module(job): job for job in JOBS}
_GENERATED = re.compile(r"<!-- (\w+) (\w+) -->\n.*?<!-- /\1 \2 -->", re.DOTALL)
_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
#: Words that begin a shell's next command.
_NEXT = {"|", "||", "&&", "&", ";", ">"}
_ASSIGNED = re.compile(r"(?:export\s+|\s)?([A-Z]+)=(\S+)")


def name(page: Path) -> str:
    return str(page.relative_to(SOURCE_TREE))


def text(page: Path) -> str:
    return _GENERATED.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line in the page's blocks, continued lines joined, comments left out.

    Also what the text sets in backquotes. Variables that the page gives a value are filled in.
    """
    written = text(page)
    blocks = [block.replace("\\\n", " ") for block in _BLOCK.findall(written)]
    values = {variable: value for block in blocks for variable, value in _ASSIGNED.findall(block)}
    spans = [span for span in _SPAN.findall(_BLOCK.sub("", written)) if "..." not in span]
    for line in [*(line for block in blocks for line in block.splitlines()), *spans]:
        filled = re.sub(r"\$([A-Z]+)(?=/)", lambda found: values.get(found[1], found[0]), line.removeprefix("$ "))
        try:
            words = shlex.split(filled, comments=True)
        except ValueError:  # no command: a picture in letters, a text
            continue
        while words:
            yield (command := list(takewhile(lambda word: word not in _NEXT, words)))
            words = words[len(command) + 1 :]


def called(words: list[str]) -> list[str]:
    """The program and its arguments: without variables that are set before it, and without its directory."""
    rest = words
    while rest and re.fullmatch(r"[A-Z_]+=.*", rest[0]):
        rest = rest[1:]
    return [Path(rest[0]).name, *rest[1:]] if rest else []


def problem(words: list[str]) -> str | None:
    """Why a command line of ours cannot be typed; None if it can, or is no command of ours."""
    match called(words):
        case ["ipvla", "help" | "completion" | "--help" | "JOB", *_]:
            return None
        case ["ipvla", first, *rest]:
            job, arguments = named([first, *rest])
            return _job_problem(job, arguments) if job in JOBS else f"there is no job {job}"
        case ["python", "-m", run, *arguments]:
            return _module_problem(run, arguments)
        case ["make", *words] if targets := [word for word in words if re.fullmatch(r"[a-z-]+", word)]:
            known = re.search(r"^\.PHONY: (.*)$", (SOURCE_TREE / "Makefile").read_text(), re.MULTILINE)
            assert known is not None
            strange = set(targets) - set(known[1].split())
            return f"make has no target {strange}" if strange else None
    return None


def _module_problem(run: str, arguments: list[str]) -> str | None:
    if run in MODULES:
        return _job_problem(MODULES[run], arguments)
    package = run.partition(".")[0]
    if package not in {"ray_jobs", "studies", "benchmarks", "tests"} or run.endswith((".JOB", ".NAME")):
        return None
    spec = find_spec(run)
    if spec is None or spec.origin is None:
        return f"there is no module {run}"
    settings = re.search(r"^    run\((\w+), main", Path(spec.origin).read_text(), re.MULTILINE)
    if not arguments or package == "tests" or settings is None:
        return None
    config = getattr(import_module(run), settings[1])
    small = ["--quick", "true"] if hasattr(config, "quick") else []  # where a GPU is wanted, none is here
    try:
        parse(config, [*arguments, *small])
    except SettingError as error:
        return str(error)
    return None


def _job_problem(job: str, arguments: list[str]) -> str | None:
    if (said := unknown(job, arguments)) is not None:
        return said
    for word in arguments:
        if re.fullmatch(r"(ray_jobs|cluster_configs)/\S+\.ya?ml", word):
            if not (SOURCE_TREE / word).exists():
                return f"there is no {word}"
            yaml.safe_load((SOURCE_TREE / word).read_text())
    return None


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = _HEADING.findall(_BLOCK.sub("", page.read_text()))
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def words_of(page: Path) -> int:
    return len(text(page).split())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_commands_can_be_typed(page: Path) -> None:
    found = [f"{shlex.join(words)}: {said}" for words in commands(page) if (said := problem(words)) is not None]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_pages_name_files_that_exist() -> None:
    overview = SOURCE_TREE / "docs" / "OVERVIEW.md"
    folders = "ipvla|evaluators|ray_jobs|studies|benchmarks|tests|integrations|cluster_configs"
    named_files = re.findall(rf"`((?:{folders})/[\w/.]*)`", text(overview))
    assert len(named_files) > 20
    assert not [file for file in named_files if not (SOURCE_TREE / file).exists()]


def test_the_overview_names_every_folder() -> None:
    overview = text(SOURCE_TREE / "docs" / "OVERVIEW.md")
    packages = [path.parent for path in SOURCE_TREE.glob("*/__init__.py")]
    folders = [
        *(one for one in packages if one.name != "ipvla"),
        *(path.parent for path in (SOURCE_TREE / "ipvla").glob("*/__init__.py")),
    ]
    assert not [folder for folder in folders if f"`{folder.relative_to(SOURCE_TREE)}/`" not in overview]


def test_the_pages_together_are_short() -> None:
    lengths = {name(page): words_of(page) for page in PAGES}
    assert sum(lengths.values()) <= MOST_WORDS, lengths


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ipvla trian --name x", "no job trian"),
        ("python -m ray_jobs.train --nmae x", "did you mean 'name'"),
        ("MUJOCO_GL=egl .venv/bin/python -m ray_jobs.evaluate --polices '[a]'", "did you mean 'policies'"),
        ("ipvla submit -- train --config_path ray_jobs/experiments/none.yaml", "there is no ray_jobs/experiments"),
        ("make tset", "no target"),
        ("python -m studies.memroy", "no module studies.memroy"),
        ("python -m studies.memory --sedes '[1]'", "did you mean 'seeds'"),
        ("kubectl apply -f none.yaml", None),
        ("ipvla data show cue --data_root_dir /data", None),
    ],
)
def test_a_wrong_command_is_found(line: str, said: str | None) -> None:
    found = problem(shlex.split(line))
    assert found is None if said is None else found is not None and said in found
