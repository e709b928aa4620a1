"""The vocabulary: records that cross the borders between rooms.

Shape letters: B batch (lanes or waiting episodes), K window (policy steps), C chunk (actions), A action
dimensions, P proprioception dimensions, V camera views, H and W pixels, L prompt tokens, Lp plan tokens,
Lq question tokens, La answer tokens, N tokens, D width. Units: metres, radians, seconds; a control step is
1/20 s; one *policy step* is one call of the model, which happens every `execute` control steps. `t` always counts
control steps since the reset, in training and in rollout alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ipvla.geometry import CameraGeometry, RecordedGeometry

if TYPE_CHECKING:  # a simulator's process has no use for it: 100 MB and a second
    import torch

#: Stands where a row of token ids is shorter than its tensor; no vocabulary has it.
NO_TOKEN = -1

#: Memory is a value: named tensors, every one with a leading batch axis [B, ...].
Memory: TypeAlias = dict[str, "torch.Tensor"]
#: Of a policy at two speeds, the memory's int64 [B]: control step of the observation that the slow part's thought,
#: which the fast part acts on, rests on; -1 before the first one.
THOUGHT_T = "held/t"


@dataclass(frozen=True)
class Ahead:
    """What an answer is to go on from, in a world that does not wait for it.

    Attributes:
        actions: float32 [R, A], R >= 0: the last chunk's from the observation's control step on, in the
            simulator's units.
        delay: control steps until the answer is there: so many of `actions` are played whatever it says.
        guidance: what pulls the answer towards `actions` has at most this weight; 0 for none.
        given: the first `delay` of `actions` are the answer's own, to be gone on from.
    """

    actions: npt.NDArray[np.float32]
    delay: int
    guidance: float = 0.0
    given: bool = False

    @property
    def continued(self) -> bool:
        """Has the answer anything to do with `actions`?"""
        return len(self.actions) > 0 and (self.given or self.guidance > 0)


@dataclass(frozen=True)
class Observation:
    """What a policy may see at one control step.

    Attributes:
        images: camera name -> uint8 [H, W, 3], upright RGB.
        proprio: float32 [P]; LIBERO's layout `[position 3 (m), axis-angle 3 (rad), gripper joints 2 (m)]`.
        instruction: the task in words.
        t: control steps since the reset, 0 for the first.
        episode: name of its episode, the same in every attempt; a head's noise is drawn from it and from `t`.
        ahead: None where the world waits for an answer, and then its first actions are played.
        geometry: camera name -> where the pixels of its picture are; None where nobody asked for it.
    """

    images: Mapping[str, npt.NDArray[np.uint8]]
    proprio: npt.NDArray[np.float32]
    instruction: str
    t: int
    episode: str = ""
    ahead: Ahead | None = field(default=None, kw_only=True)
    geometry: Mapping[str, CameraGeometry] | None = field(default=None, kw_only=True)


@dataclass
class ModelInputs:
    """Observations as tensors, before the backbone; leading axes are free ([B] in rollout, [B, K] in training).

    Attributes:
        images: uint8 [..., V, H, W, 3].
        proprio: float32 [..., P], normalised to about [-1, 1].
        input_ids: int64 [..., L], the prompt; ids past its end are in the vocabulary and mean nothing.
        attention_mask: bool [..., L], True on the prompt's tokens, which stand first.
        points: float32 [..., V, g, g, 3], in metres, of the g x g patches of each picture, NaN where unknown; None
            for a model that reads none.
    """

    images: torch.Tensor
    proprio: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    points: torch.Tensor | None = None

    def map(self, function: Any) -> Self:
        """The same record with `function` applied to each tensor."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if x is None else function(x) for name, x in tensors.items()}
        return type(self)(**changed)

    def with_prompt(self, ids: torch.Tensor) -> Self:
        """The same observations with other prompts, int64 [..., L], NO_TOKEN past their ends, and no replies."""
        return replace(self, input_ids=ids.clamp(min=0), attention_mask=ids != NO_TOKEN)

    def flatten(self) -> Self:
        """[B, K, ...] -> [B * K, ...]."""
        return self.map(lambda x: x.flatten(0, 1))

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda x: x.to(device, non_blocking=True))


@dataclass
class StepBatch:
    """One window of every lane: what a training step consumes.

    Attributes:
        inputs: ModelInputs with leading axes [B, K].
        actions: float32 [B, K, C, A], normalised targets.
        action_valid: bool [B, K, C], False past the episode's end.
        is_first: bool [B, K], True on an episode's first policy step: the memory is reset there.
        valid: bool [B, K], False where a lane is idle; an idle step carries the memory through unchanged.
        t: int64 [B, K], control steps since the reset.
        episode_key: int64 [B, K], the episode's index in its dataset, -1 where idle.
        noise_seed: int64 [B, K], of the noise of a head that takes some: a function of lanes.seed, epoch, episode
            and `t`.
        plan: int64 [B, K, Lp], tokens of the reasoning that holds once this step's observation is seen, NO_TOKEN
            past its end, and everywhere if nothing was recorded or the lane is idle. Lp is 0 if no plans are read.
        last_plan: int64 [B, K, Lp], `plan` of the episode's previous policy step, one stride of control steps
            earlier and perhaps in the window before; NO_TOKEN where is_first.
        question: int64 [B, K, Lq], the prompt of a question about this step's observation, NO_TOKEN past its end,
            and everywhere if none was recorded or the lane is idle. Lq and La are 0 if no questions are read.
        answer: int64 [B, K, La], tokens of its answer, NO_TOKEN past its end, and everywhere if `question` is.
    """

    inputs: ModelInputs
    actions: torch.Tensor
    action_valid: torch.Tensor
    is_first: torch.Tensor
    valid: torch.Tensor
    t: torch.Tensor
    episode_key: torch.Tensor
    noise_seed: torch.Tensor
    plan: torch.Tensor
    last_plan: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor

    def to(self, device: torch.device | str) -> StepBatch:
        return StepBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Episode:
    """A whole recorded episode of T control steps.

    Attributes:
        task, family, instruction: names and the task in words.
        seed: of the layout, non-negative.
        images: camera name -> uint8 [T, H, W, 3], upright RGB, seen before the action of the same row.
        state: float32 [T, P], unnormalised proprioception.
        action: float32 [T, A], environment units.
        reasoning: T texts, the demonstrator's plan as it reads once the row's images are seen; () if not recorded.
        questions, answers: T texts each, a question about the row's images and its answer, "" for none; () if not
            recorded.
        geometry: camera name -> where the pixels of its images are, of all cameras or none.
    """

    task: str
    family: str
    instruction: str
    seed: int
    images: Mapping[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    geometry: Mapping[str, RecordedGeometry] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to be run: the journal's key is all of it but `attempt`.

    Attributes:
        suite, task: names.
        seed: decides the layout, the cue and everything else that is random in the episode.
        trial: position in its task's list of held-out seeds, shared by every policy (for pairing).
        attempt: 0 at first; one more each time something died underneath the episode.
    """

    suite: str
    task: str
    seed: int
    trial: int
    attempt: int = 0

    @property
    def key(self) -> str:
        return f"{self.suite}/{self.task}/{self.trial}/{self.seed}"


@dataclass(frozen=True)
class EpisodeTrace:
    """What was played and how long it took: enough to play the episode again, step by step.

    Attributes:
        actions: float32 [T, A], as the simulator got them.
        step_s: float32 [T], seconds that the simulator took for each.
        asked_t: int32 [N], the control step at which the policy was asked.
        answer_s: float32 [N], seconds until it had answered.
        latency: int32 [N], control steps from each of them to its answer; None where the world waited.
        call: int32 [T], of each action the call that it is an answer to, from 0, -1 where the robot kept still;
            None where the world waited and each chunk followed the other.
        thought_t: int32 [N], of each call the control step of the observation that the slow part's thought rested
            on; None of a policy at one speed.
    """

    actions: npt.NDArray[np.float32]
    step_s: npt.NDArray[np.float32]
    asked_t: npt.NDArray[np.int32]
    answer_s: npt.NDArray[np.float32]
    latency: npt.NDArray[np.int32] | None = None
    call: npt.NDArray[np.int32] | None = None
    thought_t: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """What an episode came to.

    Attributes:
        outcome: "success", "failure" (the task's state machine said so) or "timeout" (horizon reached).
        steps: control steps played.
        policy_steps: calls of the policy.
        wall_s, policy_s: seconds in all, and of them waiting for the policy.
        sim_cpu_s: CPU seconds of the simulator's process but for what it spent on asking the policy.
        details: small JSON values of the suite's own (which button, presses, ...).
        trace: of an episode that was just played; not part of what makes two results equal.
    """

    spec: EpisodeSpec
    outcome: str
    steps: int
    policy_steps: int
    wall_s: float
    policy_s: float
    sim_cpu_s: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    trace: EpisodeTrace | None = field(default=None, compare=False)

    @property
    def success(self) -> bool:
        return self.outcome == "success"
