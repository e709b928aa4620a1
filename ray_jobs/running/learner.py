"""A trained policy that plays the first steps of episodes which an expert then corrects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ipvla.contract import Contract, fitted
from ipvla.policy import Policy, policy_contract, policy_sha256
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Simulator


@dataclass(frozen=True)
class LearnerConfig:
    """Who plays before the expert does, and for how long.

    Demonstrations then begin where this policy's mistakes lead, and show how to come back: interactive imitation
    with an expert who takes over (HG-DAgger, Kelly et al. 2019, arXiv:1810.02890; DAgger, Ross et al. 2011,
    arXiv:1011.0686). Trained on beside the first demonstrations (`data.mixture`), from this policy
    (`start_from`).

    Attributes:
        policy: directory of a trained policy.
        steps: the most control steps that it plays; an episode draws how many, from 0 on.
    """

    policy: Path = Path()
    steps: int = 120

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"learner.steps is {self.steps}; let it play 1 control step or more")

    def check(self, offered: Contract, cameras: tuple[str, ...], suite: str) -> None:
        """ValueError (ContractError, CheckpointError) if the policy is none or does not fit the suite."""
        contract = policy_contract(self.policy)
        if contract is None:
            raise ValueError(f"learner.policy: there is no policy.json in {self.policy}; give a trained policy")
        fitted(contract, offered, f"the policy in {self.policy}", suite)
        if lacking := sorted(set(contract.cameras) - set(cameras)):
            raise ValueError(
                f"cameras: {list(cameras)} lack {', '.join(lacking)}, which the learner looks through; add them"
            )

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides the episodes that it leads to."""
        return {"policy": policy_sha256(self.policy), "steps": self.steps}

    def build(self, offered: Contract, suite: str) -> Learner:
        """The policy, loaded."""
        return Learner(Policy.load(self.policy).require_finite(), self.steps, offered, suite)


class Learner:
    """Plays from an episode's beginning, with its memory if it has one.

    Args:
        policy: whose actions are played, `policy.execute` of each chunk.
        steps: the most control steps.
        offered: the simulator's terms.
        suite: the simulator's.
    """

    def __init__(self, policy: Policy, steps: int, offered: Contract, suite: str) -> None:
        self._policy, self._steps, self._suite = policy, steps, suite
        self._view = fitted(policy.contract, offered)

    def __call__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        """Up to a number of steps drawn from `rng`, or until the task is decided."""
        world = ProtocolSimulator(simulator, load_protocol("ipvla"), self._suite)
        world.show(self._view)
        memory, played, steps = self._policy.initial_memory(1), 0, int(rng.integers(self._steps + 1))
        while played < steps:
            chunks, memory = self._policy.act([replace(world.observe(), t=played)], memory)
            for action in chunks[0][: min(steps - played, self._policy.execute)]:
                played += 1
                if world.step(action).done:
                    return
