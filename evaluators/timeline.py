"""One episode on one time axis: when the slow part thought, when the policy was asked, how old its ground was."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ipvla.types import EpisodeResult, EpisodeTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_THOUGHT, _CALL, _LATE, _AGE = "#3a6ea5", "#2a9d55", "#e0a030", "#555555"


def has_timeline(trace: EpisodeTrace) -> bool:
    """Was there a slow part, or a world that did not wait? Else every action rests on the latest observation."""
    return trace.thought_t is not None or trace.call is not None


def ages(trace: EpisodeTrace) -> npt.NDArray[np.float64]:
    """Of what each action rested on, float [T] in control steps; nan where the robot kept still.

    That is the slow part's thought, or where there is none the answer's observation.
    """
    steps = np.arange(len(trace.actions))
    asked = np.searchsorted(trace.asked_t, steps, side="right") - 1
    call = asked if trace.call is None else trace.call
    seen = trace.asked_t if trace.thought_t is None else trace.thought_t
    return np.where(call < 0, np.nan, steps - seen[call])


def thoughts(trace: EpisodeTrace) -> list[tuple[int, int, int]]:
    """Of each thought that was acted on, control steps: its observation's, the first and the last call's."""
    if trace.thought_t is None:
        return []
    begun = dict.fromkeys(trace.thought_t.tolist())
    calls = {t: trace.asked_t[trace.thought_t == t] for t in begun}
    return [(t, int(asked[0]), int(asked[-1])) for t, asked in calls.items()]


def timeline(result: EpisodeResult, trace: EpisodeTrace) -> bytes:
    """A PNG with three rows over control steps: thoughts, calls of the policy, and `ages`; its title is the end.

    A dot is a thought's observation, a line from it the time until it was acted on, and a bar how long it was.
    """
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    slow, fast, age = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 2))
    told, end, old = thoughts(trace), len(trace.actions), ages(trace)
    until = [first for _, first, _ in told[1:]] + [end]
    for i, (begun, first, _) in enumerate(told):
        slow.broken_barh([(first, until[i] - first)], (0.2, 0.6), color=_THOUGHT, alpha=0.4)
        slow.plot([begun, first], [0.5, 0.5], color=_THOUGHT)
        slow.plot([begun], [0.5], marker="o", color=_THOUGHT)
    fast.vlines(trace.asked_t, 0.2, 0.8, color=_CALL)
    if trace.latency is not None:
        late = [(int(t), int(d)) for t, d in zip(trace.asked_t, trace.latency, strict=True) if d]
        fast.broken_barh(late, (0.35, 0.3), color=_LATE, alpha=0.6)
    age.step(np.arange(end + 1), np.append(old, old[-1:]), where="post", color=_AGE)
    age.set(xlabel="control step", ylabel="age of what\nit rests on", ylim=(0, None), xlim=(-0.5, end + 0.5))
    age.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, name in ((slow, "slow part\nthinks"), (fast, "policy\nis asked")):
        _bare(axes, name)
    slow.set_title(f"{result.spec.key}: {result.outcome} after {result.steps} control steps", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _bare(axes: Axes, name: str) -> None:
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
