"""Can the policy still say what it sees? Questions about held-out pictures, answered by its backbone in words.

Pictures come from layouts that no demonstration shows: an episode's start, and where the task shows a cue, steps
from its first to as long after it as it lasted. Records of one layout resemble each other, so the intervals, which
count them as independent, are somewhat too narrow: give more episodes rather than more questions each.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from evaluators.success_table import SuccessRow
from ipvla.files import replacing
from ipvla.policy import Policy
from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.libero import ACTION_SIZE, CAMERA, LiberoSimulator
from ipvla.sim.recall.episode import episode_rng
from ipvla.sim.recall.labels import KINDS, draw, look, questions
from ipvla.sim.simulator import Split
from ipvla.sim.suites import load_suite
from ipvla.types import Observation

#: Changes whenever the same settings would give other records.
PROTOCOL = "grounding-1"
_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class GroundingRecord:
    """One question about one picture.

    Attributes:
        task, seed, t: where it was taken.
        kind, question, answer: as in `ipvla.sim.recall.labels`.
        image: uint8 [H, W, 3], upright RGB.
        proprio: float32 [8], LIBERO's layout.
    """

    task: str
    seed: int
    t: int
    kind: str
    question: str
    answer: str
    image: npt.NDArray[np.uint8]
    proprio: npt.NDArray[np.float32]

    @property
    def described(self) -> dict[str, Any]:
        """All but image and proprioception, as JSON values."""
        return {name: getattr(self, name) for name in ("task", "seed", "t", "kind", "question", "answer")}


@dataclass(frozen=True)
class GroundingConfig:
    """Which pictures are asked about; `build` takes them.

    Attributes:
        tasks: of the suite `recall`.
        episodes: held-out layouts of each task.
        first_layout: the first of them; another slice than those that settings were chosen on.
        per_episode: questions about each episode, none of them twice about the same picture.
        camera_size: pixels.
    """

    tasks: tuple[str, ...] = (
        "ground_red",
        "ground_yellow",
        "recall",
        "items_2",
        "order_2",
        "count_red1_blue1",
        "place",
    )
    episodes: int = 50
    first_layout: int = 0
    per_episode: int = 4
    camera_size: int = 64

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"grounding.tasks is {list(self.tasks)}; name at least one, and none twice")
        for name in ("episodes", "per_episode", "camera_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"grounding.{name} is {getattr(self, name)}; pass 1 or more")
        if self.first_layout < 0:
            raise ValueError(f"grounding.first_layout is {self.first_layout}; pass 0 or more")

    def build(self, cache_dir: Path) -> tuple[GroundingRecord, ...]:
        """The records, from `cache_dir/grounding` if they are there unharmed, otherwise taken in the simulator.

        Raises:
            ValueError: the suite has no such task, or nothing can be asked about it.
        """
        depends_on = {"protocol": PROTOCOL, **asdict(self), **fingerprint()}
        name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_dir / "grounding" / f"{name}.safetensors"
        records = _load(path)
        if records is None:
            records = tuple(self._take(cache_dir))
            _save(records, path)
        return records

    def _take(self, cache_dir: Path) -> Iterator[GroundingRecord]:
        suite = load_suite("recall", cache_dir)
        for task in [suite.task(name) for name in self.tasks]:
            taken = 0
            with closing(suite.simulator(task.name, self.camera_size)) as simulator:
                assert isinstance(simulator, LiberoSimulator)
                for index in range(self.first_layout, self.first_layout + self.episodes):
                    for record in _episode(simulator, Split.HELD_OUT.seed(index), self.per_episode):
                        taken += 1
                        yield record
            if not taken:
                raise ValueError(f"grounding.tasks: nothing can be asked about {task.name!r}; leave it out")


def grounding(policy: Policy, records: Sequence[GroundingRecord]) -> tuple[SuccessRow, ...]:
    """One row per kind that occurs, in the order of `KINDS`, and one of all."""
    return tabulate(records, answered(policy, records))


def answered(policy: Policy, records: Sequence[GroundingRecord], batch: int = 64) -> npt.NDArray[np.bool_]:
    """bool [records]: which of them the policy answers in exactly the right words, greedily and without a memory.

    Raises:
        ValueError: the policy sees another camera than the records'.
    """
    model = policy.model
    was_training = model.training
    model.eval()
    right = []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        observations = [Observation({CAMERA: r.image}, r.proprio, "", r.t) for r in some]
        inputs = policy.transforms.inputs(observations).to(model.action_varies.device)
        answers = model.backbone.answer(inputs, [r.question for r in some], _ANSWER_TOKENS)
        right += [answer == r.answer for answer, r in zip(answers, some, strict=True)]
    model.train(was_training)
    return np.array(right, np.bool_)


def tabulate(records: Sequence[GroundingRecord], right: npt.NDArray[np.bool_]) -> tuple[SuccessRow, ...]:
    """The rows of answers `right` bool [records]: the right ones of each kind, and of `all`.

    Chance is what giving each kind's most frequent answer would get right.

    Raises:
        ValueError: there are no records, or not as many answers.
    """
    if not records or right.shape != (len(records),):
        raise ValueError(f"{len(records)} records and answers of shape {right.shape}; give one answer for each")
    rows, usual = [], 0
    for kind in KINDS:
        places = [i for i, record in enumerate(records) if record.kind == kind]
        if places:
            most = max(Counter(records[i].answer for i in places).values())
            rows.append(SuccessRow(kind, int(right[places].sum()), len(places), most / len(places)))
            usual += most
    return *rows, SuccessRow("all", int(right.sum()), len(records), usual / len(records))


def digest(records: Sequence[GroundingRecord]) -> str:
    """Hexadecimal SHA-256 of all that the records hold: what a result says it was measured on."""
    sha256 = hashlib.sha256()
    for record in records:
        described = json.dumps([record.described, record.image.shape]).encode()
        sha256.update(described + record.image.tobytes() + record.proprio.tobytes())
    return sha256.hexdigest()


def _episode(simulator: LiberoSimulator, seed: int, count: int) -> Iterator[GroundingRecord]:
    simulator.reset(seed)
    problem: Any = simulator.problem
    task = problem.task
    rng = episode_rng(task, seed, "grounding")
    asked: set[tuple[int, str]] = set()
    for t in sorted(rng.integers(max(2 * task.shown_steps, 1), size=count).tolist()):
        while problem.t < t:
            simulator.step(np.zeros(ACTION_SIZE))
        possible = [q for q in questions(look(problem)) if (t, q.text) not in asked]
        question = draw(possible, rng)
        if question is not None:
            asked.add((t, question.text))
            observation = simulator.observe()
            yield GroundingRecord(
                task=task.name,
                seed=seed,
                t=t,
                kind=question.kind,
                question=question.text,
                answer=question.answer,
                image=observation.images[CAMERA],
                proprio=observation.proprio,
            )


def _save(records: Sequence[GroundingRecord], path: Path) -> None:
    tensors = {name: np.stack([getattr(r, name) for r in records]) for name in ("image", "proprio")}
    metadata = {"records": json.dumps([r.described for r in records]), "sha256": digest(records)}
    with replacing(path) as part:
        save_file(tensors, part, metadata)


def _load(path: Path) -> tuple[GroundingRecord, ...] | None:
    """None if the file is not there, or is not what was saved."""
    try:
        with safe_open(path, "np") as file:
            metadata, images, proprio = file.metadata(), file.get_tensor("image"), file.get_tensor("proprio")
        described = json.loads(metadata["records"])
        records = tuple(
            GroundingRecord(**t, image=i, proprio=p) for t, i, p in zip(described, images, proprio, strict=True)
        )
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
    return records if digest(records) == metadata["sha256"] else None
