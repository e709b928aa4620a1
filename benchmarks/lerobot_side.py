"""LeRobot's side of `benchmarks.lerobot`: its own environments and evaluation loop play recorded actions.

    /path/to/lerobot/bin/python -m benchmarks.lerobot_side WORK.json

Runs where LeRobot is installed and imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.configs import LiberoEnv
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.envs.utils import close_envs
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.scripts.lerobot_eval import eval_policy_all
from torch import Tensor

#: Of the world, as `lerobot-eval` has it by default.
_SEED: Final = 1000
_PACKAGES: Final = ("lerobot", "torch", "numpy", "gymnasium", "mujoco", "robosuite", "hf-libero")


@PreTrainedConfig.register_subclass("recorded_actions")
@dataclass
class RecordedConfig(PreTrainedConfig):
    """Of `RecordedPolicy`; nothing of it is trained.

    Attributes:
        actions: an .npy of float32 [T, A].
        execute: actions of a chunk.
        seen: directory for what it is shown; empty to write nothing.
    """

    actions: str = ""
    execute: int = 1
    seen: str = ""

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.execute))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> None:
        return None

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None: ...


class RecordedPolicy(PreTrainedPolicy):
    """Answers with recorded actions, a chunk at a time, and takes no time for it."""

    config_class = RecordedConfig
    name = "recorded_actions"

    def __init__(self, config: RecordedConfig) -> None:
        super().__init__(config)
        self._actions = torch.from_numpy(np.load(config.actions))
        self._batches: Counter[str] = Counter()
        self.reset()

    def get_optim_params(self) -> dict[str, Any]:
        return {}

    def reset(self) -> None:
        self._t = 0
        self._queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        raise NotImplementedError("recorded actions are not trained")

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Float32 [B, execute, A]."""
        chunk = self._actions[self._t : self._t + self.config.execute]
        if self.config.seen:
            self._write(batch)
        self._t += len(chunk)
        return chunk.expand(len(batch["observation.state"]), *chunk.shape)

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Float32 [B, A]."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch).unbind(1))
        return self._queue.popleft()

    def _write(self, batch: dict[str, Any]) -> None:
        """What is seen of every environment, in a file per task, trial and control step."""
        (instruction,) = set(batch["task"])
        states = batch["observation.state"].numpy()
        if self._t == 0:
            self._batches[instruction] += 1
        first = (self._batches[instruction] - 1) * len(states)
        pictures = {
            name: (255 * batch[f"observation.images.{name}"]).round().byte().permute(0, 2, 3, 1).numpy()
            for name in ("image", "image2")
        }
        for row, state in enumerate(states):
            file = Path(self.config.seen) / f"{instruction}_{first + row}_{self._t}.npz"
            np.savez(file, state=state, **{name: of[row] for name, of in pictures.items()})


def main(work_file: Path) -> None:
    """Plays what the file says, and writes to its `result`."""
    imported = time.time()
    work = json.loads(work_file.read_text())
    hard_reset = {} if work["hard_reset"] is None else {"hard_reset": work["hard_reset"]}
    suite = LiberoEnv(
        task=work["suite"],
        task_ids=work["task_ids"],
        episode_length=work["steps"],
        observation_height=work["picture_px"],
        observation_width=work["picture_px"],
        **hard_reset,
    )
    batch = work["simulators"]
    envs = make_env(suite, n_envs=batch, use_async_envs=batch > 1)
    policy = RecordedPolicy(
        RecordedConfig(device="cpu", actions=work["actions"], execute=work["execute"], seen=work["seen"])
    )
    to_policy, to_environment = make_env_pre_post_processors(env_cfg=suite, policy_cfg=policy.config)
    began = time.time()
    with torch.no_grad():
        results = eval_policy_all(
            envs=envs,
            policy=policy,
            env_preprocessor=to_policy,
            env_postprocessor=to_environment,
            preprocessor=PolicyProcessorPipeline(steps=[]),
            postprocessor=PolicyProcessorPipeline(
                steps=[],
                to_transition=policy_action_to_transition,
                to_output=transition_to_policy_action,
            ),
            n_episodes=work["trials"],
            start_seed=_SEED,
        )
    ended = time.time()
    close_envs(envs)
    told = {
        "imported": imported,
        "began": began,
        "ended": ended,
        "episodes": results["overall"]["n_episodes"],
        "success_percent": results["overall"]["pc_success"],
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}},
    }
    Path(work["result"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
