"""The `ipvla` command: every job by name, and its completion."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ipvla.storage import SOURCE_TREE
from ray_jobs import __main__ as console
from ray_jobs.command_line.help import help_text
from ray_jobs.command_line.index import answer, found, settings, unknown
from ray_jobs.command_line.jobs import JOBS, config_class, module, named, parser, summary
from ray_jobs.command_line.settings import options


def ipvla(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs", *arguments],
        cwd=SOURCE_TREE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_jobs_are_listed_without_being_imported() -> None:
    loaded = "import sys; from ray_jobs.__main__ import usage; print(usage()); assert 'torch' not in sys.modules"
    told = subprocess.run(
        [sys.executable, "-c", loaded], cwd=SOURCE_TREE, capture_output=True, text=True, check=True
    ).stdout
    for job in JOBS:
        assert f"  {job} " in told
        assert summary(job) in told


def test_every_job_can_be_run_and_no_other_module_can() -> None:
    jobs = SOURCE_TREE / "ray_jobs"
    modules = {
        " ".join(path.relative_to(jobs).with_suffix("").parts)
        for path in jobs.rglob("*.py")
        if path.stem != "__main__" and 'if __name__ == "__main__"' in path.read_text()
    }
    of_jobs = {module(job).removeprefix("ray_jobs.").replace(".", " ") for job in JOBS}
    assert modules == of_jobs
    beside = {path.stem for path in jobs.glob("*.py")} - {"__init__", "__main__"}
    assert beside == {name for name in of_jobs if " " not in name}, "what is no job has a folder"
    for job in JOBS:
        assert config_class(job).__name__ == JOBS[job]


def test_a_job_is_what_its_module_is() -> None:
    by_name, by_module = (
        subprocess.run(
            [sys.executable, "-m", *words],
            cwd=SOURCE_TREE,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for words in (("ray_jobs", "merge", "--into", "x"), ("ray_jobs.merge", "--into", "x"))
    )
    assert by_name.returncode == by_module.returncode == 2
    assert by_name.stderr == by_module.stderr
    assert "--into" in ipvla("merge", "--help").stdout


def test_a_job_of_two_words() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", *words, "cue", "--strips", "0"],
            cwd=SOURCE_TREE,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for words in (("ray_jobs", "data", "show"), ("ray_jobs.data", "show"))
    ]
    assert {done.returncode for done in told} == {2}
    assert {done.stderr for done in told} == {"error: strips is 0; it must be at least 1\n"}
    alone = ipvla("data")
    assert alone.stderr == "error: data: there is no such job; did you mean 'data show'?\n"


@pytest.mark.parametrize(
    ("words", "job", "rest"),
    [
        (["data", "show", "cue"], "data show", ["cue"]),
        (["train", "--name", "show"], "train", ["--name", "show"]),
        (["data", "shwo"], "data", ["shwo"]),
        (["data"], "data", []),
    ],
)
def test_a_command_line_begins_with_a_job(words: list[str], job: str, rest: list[str]) -> None:
    assert named(words) == (job, rest)


def test_help_names_what_may_come_first() -> None:
    text = help_text(config_class("data show"), "ipvla data show", "")
    assert text.startswith("usage: ipvla data show [DATASET] [--config_path FILE]")


def test_what_is_no_job() -> None:
    done = ipvla("trian")
    assert (done.returncode, done.stderr) == (2, "error: trian: there is no such job; did you mean 'train'?\n")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_is_the_list(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ipvla", *words])
    console.main()
    assert capsys.readouterr().out == console.usage() + "\n"


def test_completion_knows_jobs_settings_and_choices() -> None:
    found = ipvla("completion", "bash")
    assert found.returncode == 0
    script = found.stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for known in ("subspaces", "--model.memory.type", "--lanes.window", "--config_path"):
        assert known in script
    wrong = ipvla("completion", "fihs")
    assert (wrong.returncode, "no completion" in wrong.stderr) == (2, True)


def test_every_setting_is_completed_once() -> None:
    names = [name for name, _ in options(config_class("train"))]
    assert len(names) == len(set(names)) > 100
    assert {"training.steps", "model.memory.type", "forgetting.thermostat.kp", "storage_root"} <= set(names)
    assert parser().parse_args(["train", "--model.memory.type", "gru"])
    assert parser().parse_args(["data", "show", "cue", "--skip_noops", "true"]).dataset == "cue"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job: str) -> None:
    """In this process; a setting that no docstring explains is named."""
    text = help_text(config_class(job), f"ipvla {job}", "")
    assert text.startswith(f"usage: ipvla {job} ")
    for name, _ in options(config_class(job)):
        assert f"  --{name} " in text


def test_help_tells_a_choice_and_its_variants() -> None:
    text = help_text(config_class("train"), "ipvla train", "")
    assert "  --model.memory.type {bank,chain,gru," in text
    assert "model.memory, type lstm: Sizes of a recurrent memory." in text
    assert "model.memory, type gru: Sizes of a recurrent memory." in text
    assert "  --use_gpu true|false (default: false)\n      one GPU each." in text


@pytest.mark.parametrize("job", ["train", "evaluate", "tune"])
def test_help_of_a_large_job_begins_with_what_is_used_most(job: str) -> None:
    kind = config_class(job)
    text = help_text(kind, f"ipvla {job}", "")
    first = text.split("Most used:")[1].split("\n\n")[0]
    named_first = [line.split()[0].removeprefix("--") for line in first.splitlines() if line.startswith("  --")]
    assert tuple(named_first) == kind.most_used


def test_help_lists_choices_with_a_line_each() -> None:
    text = help_text(config_class("train"), "ipvla train", "")
    assert re.search(r"\n      bank +The perceptual-cognitive memory bank of MemoryVLA", text)
    assert re.search(r"\n      none +No memory:", text)
    assert re.search(r"\n      gpm +Adapters never act on", text)


class TestIndex:
    def test_it_and_its_page_are_as_the_config_classes(self) -> None:
        """In a process of its own: other tests add choices to this one."""
        script = (
            "from ray_jobs.command_line.index import generated, settings\n"
            "from ray_jobs.command_line.jobs import JOBS, config_class\n"
            "from ray_jobs.command_line.settings import options\n"
            "for path, text in generated().items(): assert path.read_text() == text, path\n"
            "for job in JOBS:\n"
            "    taken = {name for name, _ in options(config_class(job))}\n"
            "    assert taken == {one.name for one in settings() if job in one.jobs}, job\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=SOURCE_TREE, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"run python -m benchmarks.tables: {done.stderr[-500:]}"

    def test_every_setting_says_what_it_is(self) -> None:
        assert [one.name for one in settings() if not one.text] == []

    @pytest.mark.parametrize("job", JOBS)
    def test_what_a_job_takes_is_no_typo(self, job: str) -> None:
        assert unknown(job, [f"--{one.name}" for one in settings() if job in one.jobs]) is None

    @pytest.mark.parametrize(
        ("option", "meant"),
        [
            ("--model.memroy.type", "model.memroy: there is no such setting; did you mean 'model.memory'?"),
            ("--training.stps=3", "training.stps: there is no such setting; did you mean 'training.steps'?"),
            ("--lanes", None),  # a group as a whole
            ("--data.mixture.libero_goal", None),  # a key of a mapping
            ("--config_path", None),
        ],
    )
    def test_a_typo_is_found(self, option: str, meant: str | None) -> None:
        assert unknown("train", [option, "1"]) == meant

    def test_a_typo_is_answered_before_the_job_is_imported(self) -> None:
        script = "import sys; from ray_jobs.__main__ import main\ntry: main()\n"
        script += "finally: assert 'torch' not in sys.modules"
        command = [sys.executable, "-c", script, "train", "--training.stps", "3"]
        done = subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.startswith("error: training.stps")) == (2, True)

    def test_help_finds_settings_by_name_choice_and_meaning(self) -> None:
        assert [one.name for one in found(["--training.steps"])] == ["training.steps"]
        assert "model.memory.recency" in [one.name for one in found(["kv", "recency"])]
        assert "optimizer.lr" in [one.name for one in found(["learning", "rate"])]
        text, code = answer(["optimizer.lr"])
        assert (code, text.splitlines()[:2]) == (0, ["--optimizer.lr FLOAT (default: 0.001)", "    ipvla train"])
        assert answer(["qqqqqq"])[1] == 2
