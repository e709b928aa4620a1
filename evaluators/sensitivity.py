"""Does it hear, and does it see? How far an answer moves when one thing of a question is changed.

A question is a recorded observation, asked with an empty memory, without dropout and with a given noise. An answer
is a chunk in the units of training; the distance of two is the root mean square over its C actions and those of
their numbers that vary. Asked are, with the same noise:

- `baseline_l2`: the very same question again. Not 0: answers do not follow from questions;
- `noise_l2`: the same question with other noise, the scale without which the others mean nothing; 0 for heads that
  take none. Where a server's noise cannot be named, baseline_l2 says the same;
- `image_l2`: the pictures of another episode, everything else as it was;
- `synonym_l2`: a paraphrase; `synonym_action_l2` and `synonym_object_l2` by what is said otherwise;
- `opposite_l2`: an instruction that demands something else and could be done in the same scene.

`direction`: magnitude is not direction. Where the opposite was demonstrated too, in the same scene and with the
hand at the same place: the cosine of the answer's change to the demonstrations' difference, in [-1, 1].
Protocol: the fourth requirement's triple; floor, ratios and direction are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.table import Table

from evaluators.asked_policy import AskedPolicy, FloatArray
from evaluators.intervals import percentiles, resampled
from ipvla.data.dataset import EpisodeDataset
from ipvla.files import write_text
from ipvla.sim.instructions.sets import DIFFICULTIES, InstructionsError, InstructionSet, Wording
from ipvla.tracking import MetricSink
from ipvla.types import Observation

_OF_SYNONYMS: Final = {f"synonym_{kind}_l2": kind for kind in DIFFICULTIES}
DISTANCES: Final = ("baseline_l2", "noise_l2", "image_l2", "synonym_l2", *_OF_SYNONYMS, "opposite_l2")
#: Name -> (numerator, denominator), of means over observations.
RATIOS: Final = {
    "synonym_over_opposite": ("synonym_l2", "opposite_l2"),
    "opposite_over_noise": ("opposite_l2", "noise_l2"),
}
_MEASURES: Final = (*DISTANCES, "direction")
_RESAMPLES: Final = 10_000
#: Demonstrations of an instruction that a direction is looked up in, and how near their state must be: the root
#: mean square over its numbers, each normalised to [-1, 1].
_DEMONSTRATIONS, _NEAR = 10, 0.1
#: Distances below are rounding: the same product in a batch of another size.
_ROUNDING: Final = 1e-5


@dataclass(frozen=True)
class Asked:
    """One recorded observation; `name` is what its noise is drawn from."""

    episode: int
    t: int
    wording: Wording
    observation: Observation

    @property
    def name(self) -> str:
        return f"sensitivity/{self.episode}"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over episodes; None for an interval of a single one."""

    value: float
    interval95: tuple[float, float] | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        interval = None if self.interval95 is None else list(self.interval95)
        return {"value": self.value, "interval95": interval, "n": self.n}

    def __str__(self) -> str:
        if self.interval95 is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.interval95[0]:.4g}, {self.interval95[1]:.4g})"


@dataclass(frozen=True)
class Sensitivity:
    """One policy's.

    Attributes:
        estimates: name -> its estimate, of those of `DISTANCES`, `RATIOS` and "direction" that there are.
        by_instruction: instruction -> the same of its observations.
        left_out: what was not asked, one reason each.
    """

    policy: str
    estimates: Mapping[str, Estimate]
    by_instruction: Mapping[str, Mapping[str, Estimate]]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "policy": self.policy,
            **{name: estimate.to_dict() for name, estimate in self.estimates.items()},
            "by_instruction": {
                instruction: {name: estimate.to_dict() for name, estimate in estimates.items()}
                for instruction, estimates in self.by_instruction.items()
            },
            "left_out": list(self.left_out),
        }

    def write(self, path: Path, told: Mapping[str, Any]) -> Path:
        """Writes JSON with what else is `told`; the file appears whole or not at all."""
        return write_text(path, json.dumps({**told, **self.to_dict()}, indent=1))

    def log(self, sink: MetricSink, dataset: str, step: int = 0) -> None:
        """`sensitivity/<dataset>/<measure>` with its limits `/low` and `/high`."""
        metrics: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            metrics[metric := f"sensitivity/{dataset}/{name}"] = estimate.value
            if estimate.interval95 is not None:
                metrics |= dict(zip((f"{metric}/low", f"{metric}/high"), estimate.interval95, strict=True))
        sink.log(metrics, step)


@dataclass(frozen=True)
class Guard:
    """What a policy must not fall behind; None for what does not matter.

    Attributes:
        most_synonym_l2: a paraphrase moves it no further than this.
        least_opposite_l2: an opposite moves it at least so far.
        most_synonym_over_opposite: their ratio, in (0, 1).
        least_opposite_over_noise: an opposite to the noise floor, of a policy that has one.
        least_direction: the cosine to what was demonstrated, in [-1, 1].
    """

    most_synonym_l2: float | None = None
    least_opposite_l2: float | None = None
    most_synonym_over_opposite: float | None = None
    least_opposite_over_noise: float | None = None
    least_direction: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._limits.items():
            low = -1.0 if name == "least_direction" else 0.0
            high = 1.0 if name in ("least_direction", "most_synonym_over_opposite") else np.inf
            if not low <= value <= high:
                raise ValueError(f"guard.{name} is {value}; it must lie in {low:g} to {high:g}")
        most, least = self.most_synonym_l2, self.least_opposite_l2
        if most is not None and least is not None and most >= least:
            raise ValueError(
                f"guard is upside down: most_synonym_l2 {most} lets a paraphrase move more than least_opposite_l2 "
                f"{least} wants of an opposite; exchange them"
            )

    @property
    def _limits(self) -> dict[str, float]:
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def broken(self, found: Sensitivity) -> tuple[str, ...]:
        """Each limit that is not kept, in a line. What was not measured keeps none."""
        lines = []
        for name, limit in self._limits.items():
            kind, _, measure = name.partition("_")
            if (estimate := found.estimates.get(measure)) is None:
                lines.append(f"{measure} could not be measured, and guard.{name} is {limit:g}")
            elif estimate.value > limit if kind == "most" else estimate.value < limit:
                lines.append(f"{measure} is {estimate}, and guard.{name} {limit:g}")
        return tuple(lines)


def choose(
    dataset: EpisodeDataset, instructions: InstructionSet, policy: AskedPolicy, count: int
) -> tuple[list[Asked], dict[str, list[int]], tuple[str, ...]]:
    """At most `count` observations, of as many episodes as there are, at random control steps.

    Returns:
        The observations; instruction -> episodes that demonstrate it; texts of the dataset that the set lacks.

    Raises:
        InstructionsError: the set has none of the dataset's instructions.
    """
    rng = np.random.default_rng(0)
    found: list[tuple[int, Wording]] = []
    demonstrations: dict[str, list[int]] = {}
    unknown: dict[str, None] = {}
    for episode in rng.permutation(len(dataset)).tolist():
        text = dataset.episode(episode).instruction
        if (wording := instructions.find(text)) is None:
            unknown[text] = None
            continue
        found.append((episode, wording))
        of_wording = demonstrations.setdefault(wording.instruction, [])
        if len(of_wording) < _DEMONSTRATIONS:
            of_wording.append(episode)
        complete = not instructions.one_scene or all(
            len(demonstrations.get(one.instruction, ())) == _DEMONSTRATIONS for one in instructions.wordings
        )
        if len(found) >= count and complete:
            break
    if not found:
        raise InstructionsError(
            f"{instructions.path} has no instruction of dataset {dataset.name}, such as {next(iter(unknown))!r}"
        )
    asked = []
    for place in range(min(count, sum(int(dataset.lengths[episode]) for episode, _ in found))):
        episode, wording = found[place % len(found)]
        t = int(rng.integers(dataset.lengths[episode]))
        asked.append(Asked(episode, t, wording, dataset.observation(episode, t, policy.cameras, policy.points)))
    return asked, demonstrations, tuple(unknown)


def sensitivity(
    name: str,
    policy: AskedPolicy,
    dataset: EpisodeDataset,
    instructions: InstructionSet,
    *,
    observations: int = 64,
    noises: int = 2,
    on_observation: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Asks the policy; of `noises` draws each, if it takes any.

    Raises:
        InstructionsError: the set has no instruction of the dataset, or none of an instruction's opposites or
            synonyms fits in the policy's prompt.
        ValueError: the dataset has a single picture.
        BrokenEpisodeError: an episode cannot be read.
    """
    chosen, demonstrations, unknown = choose(dataset, instructions, policy, observations)
    too_long: dict[str, None] = {}
    rows = []
    for place, asked in enumerate(chosen):
        wording, others = _fitting(asked.wording, policy, instructions.path)
        too_long |= dict.fromkeys(others)
        donor = _donor(place, chosen)
        draws = 1 if policy.takes_noise is False else noises
        distances, change = _distances(asked, wording, donor, policy, draws)
        direction = np.nan
        if instructions.one_scene:
            direction = _direction(asked, change, demonstrations, dataset, policy, instructions)
        rows.append([*(distances[measure] for measure in DISTANCES), direction])
        on_observation()
    measured, episodes = np.array(rows), np.array([asked.episode for asked in chosen])
    said = np.array([asked.wording.instruction for asked in chosen])
    left_out = [f"not in {instructions.path.name}: {text}" for text in unknown]
    left_out += [f"longer than the policy's prompts: {text}" for text in too_long]
    return Sensitivity(
        name,
        estimates(measured, episodes),
        {text: estimates(measured[said == text], episodes[said == text]) for text in dict.fromkeys(said.tolist())},
        tuple(left_out),
    )


def estimates(measured: FloatArray, episodes: npt.NDArray[np.int64]) -> dict[str, Estimate]:
    """Of float64 [observations, measures], NaN for none, and the episode [observations] of each.

    Episodes are resampled, each with all its observations, which are not independent.
    """
    clusters = np.unique(episodes)
    totals = np.array([np.nansum(measured[episodes == one], axis=0) for one in clusters])
    counts = np.array([(~np.isnan(measured[episodes == one])).sum(axis=0) for one in clusters])
    drawn = resampled(np.concatenate([totals, counts], axis=1), _RESAMPLES, 0).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, means = totals.sum(0) / counts.sum(0), np.divide(*np.split(drawn, 2, axis=1))
        values = dict(zip(_MEASURES, mean, strict=True))
        spread = dict(zip(_MEASURES, means.T, strict=True))
        for ratio, (above, below) in RATIOS.items():
            floor = values[below] > _ROUNDING
            values[ratio] = values[above] / values[below] if floor else np.nan
            spread[ratio] = spread[above] / spread[below]
    seen = dict(zip(_MEASURES, counts.sum(0).tolist(), strict=True)) | {ratio: len(measured) for ratio in RATIOS}
    return {
        name: Estimate(float(value), _interval(spread[name]) if len(clusters) > 1 else None, seen[name])
        for name, value in values.items()
        if not np.isnan(value)
    }


def sensitivity_table(found: Sensitivity) -> Table:
    """Every measure with its interval; of each instruction the ear's three."""
    table = Table(title=f"Does {found.policy} hear?", caption="; ".join(found.left_out) or None)
    for heading in ("instruction", "measure", "mean (95 %)", "n"):
        table.add_column(heading, justify="left" if heading in ("instruction", "measure") else "right")
    for name, estimate in found.estimates.items():
        table.add_row("all", name, str(estimate), str(estimate.n))
    table.add_section()
    for instruction, of_it in found.by_instruction.items():
        for name in ("synonym_l2", "opposite_l2", "direction"):
            if name in of_it:
                table.add_row(instruction, name, str(of_it[name]), str(of_it[name].n))
    return table


def _fitting(wording: Wording, policy: AskedPolicy, path: Path) -> tuple[Wording, list[str]]:
    """The wording with the texts that the policy can be asked, and the others."""
    others = [text for text in (*wording.all_synonyms, *wording.opposites) if not policy.fits(text)]
    short = {kind: tuple(text for text in texts if text not in others) for kind, texts in wording.synonyms.items()}
    synonyms = {kind: texts for kind, texts in short.items() if texts}
    opposites = tuple(text for text in wording.opposites if text not in others)
    if not synonyms or not opposites:
        raise InstructionsError(
            f"{path}: all {'synonyms' if opposites else 'opposites'} of {wording.instruction!r} are longer than "
            "the policy's prompts; give shorter ones"
        )
    return replace(wording, synonyms=synonyms, opposites=opposites), others


def _donor(place: int, chosen: Sequence[Asked]) -> Asked:
    """Whose pictures an observation gets: the next one's of another episode, or of another step."""
    after = [*chosen[place + 1 :], *chosen[:place]]
    asked = chosen[place]
    for one in after:
        if one.episode != asked.episode:
            return one
    for one in after:
        if one.t != asked.t:
            return one
    raise ValueError("image_l2 needs another picture, and one observation was chosen; ask for 2 or more")


def _distances(
    asked: Asked, wording: Wording, donor: Asked, policy: AskedPolicy, draws: int
) -> tuple[dict[str, float], dict[str, FloatArray]]:
    """Measure -> distance, and opposite -> the answer's change [C, A], means over draws of noise."""
    seen = asked.observation
    texts = [*wording.all_synonyms, *wording.opposites]
    variants = [seen, seen, replace(seen, images=donor.observation.images)]
    variants += [replace(seen, instruction=text) for text in texts]
    # where nobody knows whether noise matters, or one draw is asked for, a further draw of the question is asked
    further = [] if policy.takes_noise is False else [seen]
    questions = [replace(one, episode=f"{asked.name}/{k}") for k in range(draws) for one in variants]
    questions += [replace(one, episode=f"{asked.name}/{draws}") for one in further]
    answers = policy.chunks(questions)
    answered = answers[: draws * len(variants)].reshape(draws, len(variants), *answers.shape[1:])
    first, others = answered[:, 0], answered[:, 1:]
    moved = _distance(others - first[:, None], policy.varies).mean(0)
    again, image, *of_texts = moved.tolist()
    of_text = dict(zip(texts, of_texts, strict=True))
    floors = [*first, *answers[draws * len(variants) :]]
    noise = [_distance(b - a, policy.varies) for i, a in enumerate(floors) for b in floors[i + 1 :]]
    distances = {
        "baseline_l2": again,
        "noise_l2": float(np.mean(noise)) if noise else 0.0,
        "image_l2": image,
        "synonym_l2": fmean(of_text[text] for text in wording.all_synonyms),
        "opposite_l2": fmean(of_text[text] for text in wording.opposites),
    }
    for measure, kind in _OF_SYNONYMS.items():
        said = wording.synonyms.get(kind, ())
        distances[measure] = fmean(of_text[text] for text in said) if said else np.nan
    changes = (others - first[:, None]).mean(0)
    return distances, {text: changes[2 + texts.index(text)] for text in wording.opposites}


def _distance(change: FloatArray, varies: npt.NDArray[np.bool_]) -> FloatArray:
    """Of changes [..., C, A]: the root mean square over actions and the numbers that vary, [...]."""
    distance: FloatArray = np.sqrt((change[..., varies] ** 2).mean((-1, -2)))
    return distance


def _direction(
    asked: Asked,
    changes: Mapping[str, FloatArray],
    demonstrations: Mapping[str, Sequence[int]],
    dataset: EpisodeDataset,
    policy: AskedPolicy,
    instructions: InstructionSet,
) -> float:
    """The mean cosine over opposites that were demonstrated from where the hand is; NaN if none was."""
    cosines = []
    own = dataset.episode(asked.episode)
    for text, change in changes.items():
        opposite = instructions.find(text)
        if opposite is None:
            continue
        done, valid = policy.targets(own, asked.t, len(change))
        near = [
            policy.targets(dataset.episode(other), step, len(change))
            for other in demonstrations.get(opposite.instruction, ())
            if (step := _nearest(asked.observation.proprio, other, dataset)) is not None
        ]
        for other_done, other_valid in near:
            both = valid & other_valid
            a, b = (x[both][:, policy.varies].ravel() for x in (change, other_done - done))
            if (scale := float(np.linalg.norm(a) * np.linalg.norm(b))) > 0:
                cosines.append(float(a @ b) / scale)
    return fmean(cosines) if cosines else np.nan


def _nearest(state: npt.NDArray[np.float32], episode: int, dataset: EpisodeDataset) -> int | None:
    """The control step of an episode whose state is nearest to this one [P]; None if it is not near."""
    proprio = dataset.statistics().proprio
    there, here = proprio.normalise(dataset.episode(episode).state), proprio.normalise(state)
    away = np.sqrt(((there - here) ** 2).mean(1))
    step = int(away.argmin())
    return step if away[step] <= _NEAR else None


def _interval(drawn: FloatArray) -> tuple[float, float] | None:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return None
    low, high = percentiles(known)
    return float(low), float(high)
