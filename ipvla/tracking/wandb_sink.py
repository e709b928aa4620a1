"""A copy of a run's metrics, settings and pictures on Weights & Biases; optional (requirements-wandb.txt)."""

from __future__ import annotations

import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from ipvla.files import write_text
from ipvla.tracking.sinks import MetricSink

if TYPE_CHECKING:
    from wandb import Run

_logger = logging.getLogger("ipvla.tracking")

Mode = Literal["online", "offline"]
#: In a run's directory: which run it is there, so that it is found again.
_RECORD: Final = "wandb.json"
_REACHED_WITHIN_S: Final = 20.0
_PICTURES, _FILMS = (".png", ".jpg"), (".mp4", ".gif")


@dataclass(frozen=True)
class WandbConfig:
    """Where a training's run goes on Weights & Biases, beside MLflow.

    Attributes:
        project: its project there; null for no copy.
        entity: whose project; null for the login's own.
        mode: online, or offline for files in the run's directory that `wandb sync` sends later.
    """

    project: str | None = None
    entity: str | None = None
    mode: Mode = "online"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"tracking.wandb.mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if self.project is None and self.entity is not None:
            raise ValueError(f"tracking.wandb.entity is {self.entity!r}, and project null; name a project")
        if self.project is not None and (not self.project or set(self.project) & set("/\\#?%:")):
            raise ValueError(f"tracking.wandb.project is {self.project!r}; W&B takes names without / \\ # ? % :")

    def require_usable(self) -> None:
        """ValueError if a run cannot be copied there: the package is missing, or there is no login."""
        if self.project is None:
            return
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"tracking.wandb.project is {self.project!r}, and the package wandb is not installed: "
                "pip install -r requirements-wandb.txt"
            )
        import wandb  # takes seconds, and few want it

        if self.mode == "online" and not wandb.login(prompt=False):
            raise ValueError(
                f"tracking.wandb.project is {self.project!r}, and nobody is logged in: run wandb login, set "
                "WANDB_API_KEY, or --tracking.wandb.mode offline"
            )

    def build(self, directory: Path, study: str, name: str) -> WandbSink | None:
        """The run of the policy `name` of `study`, new or found again in its directory; None without a project."""
        if self.project is None:
            return None
        path = directory / _RECORD
        if not path.exists():
            write_text(path, json.dumps({"id": uuid.uuid4().hex[:12], **asdict(self)}))
        return WandbSink.found(directory, study, name)


class WandbSink(MetricSink):
    """One run. Whatever fails is told once, and never ends who logs.

    Args:
        config: where it goes; with a project.
        run_id: W&B's id of it.
        directory: of the policy's run; offline files go below it.
        study: the group.
        name: what the page shows.
    """

    def __init__(self, config: WandbConfig, run_id: str, directory: Path, study: str, name: str) -> None:
        self._told = False
        self._config, self._directory, self._study, self._name = config, directory, study, name
        self._run: Run | None = self._tried(lambda: self._started(run_id, config.mode))
        if self._run is None and config.mode == "online":
            # Under another id: W&B's own process keeps the first one that failed.
            self._run = self._tried(lambda: self._started(uuid.uuid4().hex[:12], "offline"))
            if self._run is not None:
                command = f"wandb sync --id {run_id} {directory}/wandb/offline-run-*"
                _logger.warning("W&B: what %s logs lies in its directory; once W&B answers: %s", name, command)

    @classmethod
    def found(cls, directory: Path, study: str, name: str) -> Self | None:
        """The run that a policy's training had; None if it had none, or its record is damaged."""
        path = directory / _RECORD
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(errors="replace"))
            config, run_id = WandbConfig(stored["project"], stored["entity"], stored["mode"]), str(stored["id"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _logger.warning("W&B gets no copy: %s is damaged (%s); delete it for a new run there", path, error)
            return None
        return cls(config, run_id, directory, study, name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # As a metric of its own: W&B's step never goes back, and a training that goes on from a checkpoint does.
        self._log({**metrics, "step": step})

    def log_params(self, params: Mapping[str, object]) -> None:
        self._tried(lambda: self._run and self._run.config.update(dict(params), allow_val_change=True))  # type: ignore[no-untyped-call]

    def log_artifact(self, path: Path) -> None:
        """Pictures and films; policies are MLflow's."""
        if path.suffix in (*_PICTURES, *_FILMS):
            self._tried(lambda: self._log({path.stem: _media(path)}))

    def close(self, status: str = "FINISHED") -> None:
        self._tried(lambda: self._run and self._run.finish(exit_code=0 if status == "FINISHED" else 1))
        self._run = None

    def _log(self, values: Mapping[str, Any]) -> None:
        self._tried(lambda: self._run and self._run.log(dict(values)))

    def _started(self, run_id: str, mode: Mode) -> Run:
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=_REACHED_WITHIN_S)
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            id=run_id,
            name=self._name,
            group=self._study,
            dir=str(self._directory),
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _tried(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # tracking must not end a training run
            if not self._told:
                _logger.warning("W&B failed (%s); the run goes on", error)
            self._told = True
            return None


def _media(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path)) if path.suffix in _PICTURES else wandb.Video(str(path))
