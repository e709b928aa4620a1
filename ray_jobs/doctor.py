"""Checks whether this machine can run the jobs, and says what to do where it cannot.

Creates the storage directories if they are missing, links or downloads LIBERO's assets where asked to, and changes
nothing else. Exits with 1 if a check fails.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ipvla.sim.environment import SimulatorError, renderer, require_simulators
from ipvla.sim.standard.assets import AssetsError, assets_version, find_assets, provide_assets
from ipvla.sim.standard.tasks import HORIZONS, initial_states
from ipvla.sim.suites import SUITES, load_suite
from ipvla.storage import SOURCE_TREE, StorageRoots, existing
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import port_is_busy
from ray_jobs.running.display import EpisodeProgress

if TYPE_CHECKING:
    from ipvla.sim.standard.golden import Frame, Golden

_GIB = 2**30
_ENOUGH_DISK_GIB = 10
_TOO_LITTLE_DISK_GIB = 1
_LARGE_FILE_GIB = 1
_NOT_OURS = {".git", ".venv"}
_TIMEOUT_S = 120.0
#: Mean difference of pictures in small, of 255 levels, from which on a scene looks otherwise; renderers that round
#: otherwise stay far below.
VISIBLE_LEVELS = 2.0
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size=".1" rgba="1 0 0 1"/></worldbody></mujoco>'
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().std() > 0, "the picture is empty"
"""

_RAY = """
import sys
from pathlib import Path
import ray
from ipvla.storage import StorageRoots
from ray_jobs.running.cluster import connect
with connect(StorageRoots(storage_root=Path(sys.argv[1]), tmp_dir=Path(sys.argv[2]))):
    print(int(ray.cluster_resources()["CPU"]), "CPUs,", int(ray.cluster_resources().get("GPU", 0)), "GPUs")
"""


class Status(StrEnum):
    """Whether jobs will run: yes, yes but, no."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` is empty where there is nothing to do."""

    status: Status
    detail: str
    remedy: str = ""

    @classmethod
    def of(cls, error: Exception, status: Status = Status.FAIL, what: str = "") -> Self:
        """Of an error that says what was wrong, and behind a semicolon what to change."""
        detail, _, remedy = str(error).partition("; ")
        return cls(status, what + detail, remedy)


@dataclass(frozen=True)
class DoctorConfig(StorageRoots):
    """What to check.

    Attributes:
        json: print the findings as JSON instead of a table.
        libero_assets: directory with the meshes and textures of LIBERO's own suites, or "hub" to download them; a
            link in the cache keeps it for all jobs.
        premises: suites of LIBERO's whose every initial state is to be played until it rests, to see whether the
            scenes are what the tasks say; takes a minute or two per suite.
        keep_golden: what is found in these suites is what later versions are compared with.
        dashboard_port, mlflow_port: the ports that you mean to use for Ray's dashboard and MLflow's UI.
        plan: instead of all checks, what fits on a GPU: of a published model (openvla, openvla-oft, pi0, pi05,
            smolvla, paligemma, qwen2.5-vl-3b, smolvlm2-500m), or the policy in this directory.
        gpu: which one: 4090, v100, a100, h100, h200, or its memory in GB.
        gpus: how many, among which FSDP divides the weights.
        lora_rank: of the adapters in the plan.
    """

    json: bool = False
    libero_assets: str | None = None
    premises: tuple[str, ...] = ()
    keep_golden: bool = False
    dashboard_port: int = 8265
    mlflow_port: int = 5000
    plan: str | None = None
    gpu: str = "24"
    gpus: int = 1
    lora_rank: int = 32

    def __post_init__(self) -> None:
        for name in ("gpus", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def check_python(config: DoctorConfig) -> Finding:
    """The interpreter that the pins were tested with."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Finding(Status.OK, version)
    return Finding(Status.WARN, f"{version}; the pinned packages are tested with 3.11", "make PYTHON=python3.11")


def check_storage(config: DoctorConfig) -> Finding:
    """The storage roots: outside the sources, writable."""
    try:
        config.prepare()
    except ValueError as error:
        return Finding.of(error)
    return Finding(Status.OK, f"{config.root} and its directories can be written")


def check_disk(config: DoctorConfig) -> Finding:
    """Space for datasets, runs and Ray's session files."""
    free = {flag: shutil.disk_usage(existing(path)).free / _GIB for flag, path in config.directories.items()}
    flag, least = min(free.items(), key=lambda item: item[1])
    detail = f"{least:.1f} GiB free for {config.directories[flag]}"
    if least >= _ENOUGH_DISK_GIB:
        return Finding(Status.OK, detail)
    status = Status.WARN if least >= _TOO_LITTLE_DISK_GIB else Status.FAIL
    return Finding(status, detail, f"have {_ENOUGH_DISK_GIB} GiB: free some, or give another --storage_root")


def check_source_tree(config: DoctorConfig) -> Finding:
    """No model, dataset or checkpoint has strayed among the sources."""
    large = [path for path in _files(SOURCE_TREE) if path.lstat().st_size > _LARGE_FILE_GIB * _GIB]
    if not large:
        return Finding(Status.OK, f"no file above {_LARGE_FILE_GIB} GiB in {SOURCE_TREE}")
    names = ", ".join(str(path.relative_to(SOURCE_TREE)) for path in large)
    return Finding(Status.WARN, f"large files among the sources: {names}", f"move them to {config.root}")


def check_packages(config: DoctorConfig) -> Finding:
    """Every pinned package, in its pinned version."""
    missing, other = [], []
    for name, pinned in _pins():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name} {pinned}")
        else:
            if installed.partition("+")[0] != pinned:
                other.append(f"{name} {installed} instead of {pinned}")
    if missing:
        return Finding(Status.FAIL, f"not installed: {', '.join(missing)}", "make setup")
    if other:
        return Finding(Status.WARN, "; ".join(other), "make setup; results may differ from those reported")
    return Finding(Status.OK, "as pinned in requirements*.txt")


def check_gl(config: DoctorConfig) -> Finding:
    """One picture off screen, with the back end that simulators will use."""
    try:
        backend = renderer()
        require_simulators()
    except SimulatorError as error:
        return Finding.of(error)
    failure = _failure(_RENDER, {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend})
    if failure is None:
        return Finding(Status.OK, f"MuJoCo renders with {backend}")
    remedies = {"osmesa": "apt-get install libosmesa6", "egl": "apt-get install libegl1, or set MUJOCO_GL=osmesa"}
    return Finding(Status.FAIL, f"{backend}: {failure}", remedies.get(backend, "set MUJOCO_GL=osmesa"))


def check_suites(config: DoctorConfig) -> Finding:
    """What LIBERO's own suites need; the embedded one needs nothing."""
    try:
        if config.libero_assets is not None:
            provide_assets(config.cache, config.libero_assets)
        assets = find_assets(config.cache)
    except AssetsError as error:
        status = Status.WARN if config.libero_assets is None else Status.FAIL
        return Finding.of(error, status, "only Recall can be played: ")
    return Finding(Status.OK, f"{', '.join(SUITES)}; LIBERO's assets {assets_version(assets)} in {assets}")


def check_premises(config: DoctorConfig) -> Finding:
    """The scenes of the suites that were named: `ipvla.sim.standard.premises` and `.golden`."""
    if other := sorted(set(config.premises) - set(HORIZONS)):
        detail = f"{', '.join(other)}: only LIBERO's own suites have published initial states"
        return Finding(Status.FAIL, detail, f"--premises takes some of {', '.join(HORIZONS)}")
    if not config.premises:
        return Finding(Status.OK, "not asked for", '--premises "[libero_spatial]" plays the initial states')
    suites = [load_suite(name, config.cache) for name in config.premises]
    tasks = [(suite, task.name) for suite in suites for task in suite.tasks]
    total = sum(len(initial_states(suite.name, task)) for suite, task in tasks)
    wrong: dict[str, str] = {}
    frames: dict[str, Frame] = {}
    assets = assets_version(find_assets(config.cache))
    with EpisodeProgress() as progress:
        bar = progress.add_task("initial states", total=total)
        for suite, task in tasks:
            simulator = suite.simulator(task)
            from ipvla.sim.standard.golden import Golden, golden, keep, take  # these import MuJoCo, now prepared
            from ipvla.sim.standard.premises import violations

            trials = len(initial_states(suite.name, task))
            for trial in range(trials):
                for violation in violations(simulator, trial):
                    wrong[f"{suite.name}/{task}/{trial}"] = str(violation)
            frames[f"{suite.name}/{task}"] = take(simulator, assets)
            simulator.close()
            progress.advance(bar, trials)
    found = Golden(frames, frozenset(wrong))
    if config.keep_golden:
        keep(found)
    return _compared(found, golden(), total, wrong)


def _compared(found: Golden, golden: Golden, states: int, wrong: Mapping[str, str]) -> Finding:
    """Whether scenes are and look as they do with the pinned versions."""
    if new := sorted(found.violated - golden.violated):
        return Finding(
            Status.FAIL,
            f"{len(new)} of {states} initial states are no longer what their tasks say: "
            f"{'; '.join(wrong[state] for state in new[:5])}",
            "install the pinned mujoco and robosuite: these results compare with none",
        )
    physics = f"{states} initial states are as they were published"
    if found.violated:
        physics += f" ({len(found.violated)} of them never were what their tasks say)"
    alike = {name: frame for name, frame in found.frames.items() if golden.frames[name].assets == frame.assets}
    if not alike:
        theirs, ours = (", ".join(sorted({one.assets for one in of.frames.values()})) for of in (golden, found))
        return Finding(
            Status.WARN,
            f"{physics}; pictures are of assets {ours}, the golden ones of {theirs}",
            "results on other assets are other results: make assets installs the original ones",
        )
    levels = {name: frame.difference(golden.frames[name]) for name, frame in alike.items()}
    if visible := [name for name, difference in levels.items() if difference > VISIBLE_LEVELS]:
        return Finding(
            Status.WARN,
            f"{physics}, but {len(visible)} of {len(levels)} scenes look otherwise, by up to "
            f"{max(levels.values()):.1f} of 255 levels: {', '.join(visible[:3])}",
            "physics is as published and the assets are the same: take the renderer that make setup installs "
            "(libosmesa6) if policies must see the same pictures as elsewhere",
        )
    same = sum(frame.sha256 == golden.frames[name].sha256 for name, frame in alike.items())
    pictures = f"{same} of {len(levels)} pictures equal the golden ones to the last bit"
    return Finding(Status.OK, f"{physics}; {pictures}")


def check_torch(config: DoctorConfig) -> Finding:
    """What models will run on."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding(Status.OK, f"torch {torch.__version__} on {names}")
    if shutil.which("nvidia-smi"):
        detail = f"torch {torch.__version__} sees no GPU although there is an NVIDIA driver"
        return Finding(Status.WARN, detail, "install torch's CUDA build for this driver to train on the GPU")
    return Finding(Status.OK, f"torch {torch.__version__} on the CPU ({os.cpu_count()} cores)")


def check_ray(config: DoctorConfig) -> Finding:
    """A cluster really starts (or answers at `$RAY_ADDRESS`) and ends."""
    output: list[str] = []
    error = _failure(_RAY, {}, str(config.root), str(config.tmp), output=output)
    if error is None:
        return Finding(Status.OK, f"Ray starts: {output[-1]}")
    where = os.environ.get("RAY_ADDRESS")
    remedy = f"is the cluster at RAY_ADDRESS={where} up?" if where else f"see the logs in {config.tmp / 'ray'}"
    return Finding(Status.FAIL, error, remedy)


def check_ports(config: DoctorConfig) -> Finding:
    """Those that the user interfaces listen on."""
    ports = {"dashboard_port": config.dashboard_port, "mlflow_port": config.mlflow_port}
    busy = [f"{port} ({setting})" for setting, port in ports.items() if port_is_busy(port)]
    if not busy:
        return Finding(Status.OK, f"{', '.join(map(str, ports.values()))} are free")
    return Finding(Status.WARN, f"in use: {', '.join(busy)}", "choose other ports, or end what listens there")


def check_ffmpeg(config: DoctorConfig) -> Finding:
    """What encodes the videos."""
    import imageio_ffmpeg

    try:
        binary = imageio_ffmpeg.get_ffmpeg_exe()
        subprocess.run([binary, "-version"], check=True, capture_output=True, timeout=_TIMEOUT_S)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Finding(Status.WARN, f"no videos: {error}", "apt-get install ffmpeg")
    return Finding(Status.OK, binary)


#: In the order of the table. To add a check, write a function and name it here.
CHECKS: dict[str, Callable[[DoctorConfig], Finding]] = {
    "Python": check_python,
    "storage": check_storage,
    "disk": check_disk,
    "source tree": check_source_tree,
    "packages": check_packages,
    "rendering": check_gl,
    "suites": check_suites,
    "premises": check_premises,
    "torch": check_torch,
    "Ray": check_ray,
    "ports": check_ports,
    "ffmpeg": check_ffmpeg,
}


def examine(config: DoctorConfig) -> Iterator[tuple[str, Finding]]:
    """Runs all checks; one that raises has failed."""
    for name, check in CHECKS.items():
        try:
            yield name, check(config)
        except Exception as error:
            yield name, Finding(Status.FAIL, f"{type(error).__name__}: {error}", "make setup")


def main(config: DoctorConfig) -> int:
    """Prints the findings, or a plan; 1 if any finding is a failure."""
    console = Console()
    if config.plan is not None:
        _print_plan(config, config.plan, console)
        return 0
    with Console(stderr=True).status("checking; Ray takes a few seconds"):
        findings = dict(examine(config))
    if config.json:
        print(json.dumps({name: asdict(finding) for name, finding in findings.items()}, indent=1))
    else:
        console.print(_table(findings))
    return int(any(finding.status is Status.FAIL for finding in findings.values()))


def _print_plan(config: DoctorConfig, model: str, console: Console) -> None:
    from ray_jobs.planning.cards import card_named
    from ray_jobs.planning.plan import notes, plan, table  # takes seconds

    card = card_named(config.gpu)
    with Console(stderr=True).status("building the model without its weights"):
        found = plan(model, card, config.gpus, config.lora_rank)
    if config.json:
        print(json.dumps({"parameters": found.parameters, "ways": [way.to_dict(card) for way in found.ways]}))
    else:
        console.print(table(found))
        console.print(notes(found))


def _table(findings: dict[str, Finding]) -> Table:
    table = Table("check", "", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    for name, finding in findings.items():
        style = _STYLES[finding.status]
        table.add_row(name, f"[{style}]{finding.status}[/]", Text(finding.detail), Text(finding.remedy))
    return table


def _files(root: Path) -> Iterator[Path]:
    for directory, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_OURS]
        yield from (Path(directory) / name for name in names)


def _pins() -> Iterator[tuple[str, str]]:
    for file in ("requirements.txt", "requirements-libero.txt"):
        for line in (SOURCE_TREE / file).read_text().splitlines():
            if pin := re.match(r"([\w.-]+)(?:\[.*\])?==([\w.]+)", line):
                yield pin[1], pin[2]


def _failure(
    code: str, environment: dict[str, str], *arguments: str, output: list[str] | None = None
) -> str | None:
    """Runs Python code in a process of its own; the last line of its complaint, or None if it went well."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=SOURCE_TREE,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, complaint = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no answer in {_TIMEOUT_S:.0f} s"
    if output is not None:
        output += printed.splitlines()
    if process.returncode == 0:
        return None
    return (complaint.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


if __name__ == "__main__":
    run(DoctorConfig, main, __doc__)
