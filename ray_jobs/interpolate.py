"""`python -m ray_jobs.interpolate`: a policy between a teacher and what it was fine-tuned to (WiSE-FT)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipvla.training.interpolation import interpolate
from ray_jobs.command_line.cli import run


@dataclass(frozen=True)
class InterpolateConfig:
    """From two policies to a third; takes seconds, and nothing is trained.

    Attributes:
        teacher: directory of the policy that fine-tuning started from.
        tuned: directory of the policy that came of it.
        coefficient: the tuned policy's share of every weight, in [0, 1]; 0 is the teacher, 1 the tuned policy.
        out: directory of the new policy, which must not exist yet; ray_jobs.evaluate takes it as any other.
    """

    teacher: Path | None = None
    tuned: Path | None = None
    coefficient: float = 0.5
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("teacher", "tuned", "out"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given; name a policy's directory, e.g. --{name} .../policy")


def main(config: InterpolateConfig) -> None:
    """Writes the policy and says where it lies."""
    teacher, tuned, out = config.teacher, config.tuned, config.out
    assert teacher is not None
    assert tuned is not None
    assert out is not None
    if out.exists():
        raise ValueError(f"out: {out} is there already; give another directory")
    interpolate(teacher, tuned, config.coefficient).save(out)
    print(f"{config.coefficient:g} of the way from {teacher} to {tuned}: written to {out}")


if __name__ == "__main__":
    run(InterpolateConfig, main, __doc__)
