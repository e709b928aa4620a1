"""How episodes are played for their results to mean what somebody else's mean: versioned, compared field by field.

Whoever changes what a protocol does gives it a new version. Sources: the evaluation scripts of OpenVLA,
OpenVLA-OFT, openpi, LeRobot and LIBERO itself, as of 2026-11. Their tensorflow resizing is done by Pillow here,
which rounds a few pixels otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from ipvla.choices import did_you_mean
from ipvla.contract import STATE_SIZES, Contract, Pictures
from ipvla.sim.standard.tasks import HORIZONS, base_suite

_AGENT: Final = ("agentview",)
_AGENT_AND_WRIST: Final = ("agentview", "robot0_eye_in_hand")
_WAIT: Final = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


class ProtocolError(ValueError):
    """There is no such protocol, it does not cover a suite, or results of different ones were to be compared."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """What an episode is, beside its task and its initial state.

    Attributes:
        name, version: results of another name or version are of another protocol.
        horizons: suite -> control steps that the policy has; empty for those of the tasks themselves.
        trials: per task, of the published initial states from the first one on.
        world_seed: of the random numbers with which a world of LIBERO's own suites is built: where furniture
            stands, within a centimetre or two, of which initial states say nothing. A script that seeds every
            episode anew has the seed of its first one.
        settle_steps, settle_action: control steps before the policy's first one, and what is played in them.
        cameras: whose pictures a policy may see, by MuJoCo's names; empty for all that the suite has.
        render_size: side of a rendered picture, in pixels; None to leave it to the evaluation's settings.
        orientation: of the pictures, see `ipvla.contract.Orientation`. A policy whose data are known to be turned
            otherwise sees them as its data, as rendered: `jpeg`, `size` and `crop_area` are for those that were
            trained on the protocol's pictures.
        jpeg: pictures go through JPEG and back (quality 95, chroma halved), as training data did.
        size: side of the policy's pictures, in pixels; None for `render_size`.
        resize: to `size`: "lanczos" or "bilinear".
        crop_area: share of the picture's area around its centre that is cut out and blown up again; 1 for all.
        gripper: what the last action number of a server says that speaks the protocol's language: "sign" (-1 open,
            1 close, as the simulator takes it) or "open_is_1" (0 close, 1 open, binarised, as in OpenVLA's RLDS
            data). Policies of this project give the simulator's units whatever the protocol.
        proprio: "hand" (position, axis-angle, finger joints: 8 numbers) or "joints" (arm and finger joints: 9).
        execute: control steps per call of the policy; None to leave it to the policy.
    """

    name: str
    version: int
    horizons: Mapping[str, int] = field(default_factory=dict)
    trials: int = 50
    world_seed: int = 0
    settle_steps: int = 0
    settle_action: tuple[float, ...] = _WAIT
    cameras: tuple[str, ...] = _AGENT
    render_size: int | None = None
    orientation: str = "upright"
    jpeg: bool = False
    size: int | None = None
    resize: str = "lanczos"
    crop_area: float = 1.0
    gripper: str = "sign"
    proprio: str = "hand"
    execute: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "orientation": ("upright", "mirrored", "upside_down"),
            "resize": ("lanczos", "bilinear"),
            "gripper": ("sign", "open_is_1"),
            "proprio": ("hand", "joints"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"protocol {self.name}: {name} is {getattr(self, name)!r}; choose among {known}")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"protocol {self.name}: crop_area is {self.crop_area}; it must be in (0, 1]")
        for name in ("version", "trials", "render_size", "size", "execute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"protocol {self.name}: {name} is {value}; it must be at least 1")
        for name in ("world_seed", "settle_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"protocol {self.name}: {name} is {getattr(self, name)}; it must be at least 0")

    def horizon(self, suite: str, of_task: int) -> int:
        """Control steps that a policy has in a suite, given the task's own.

        Raises:
            ProtocolError: the protocol does not cover the suite.
        """
        suite = base_suite(suite)
        if self.horizons and suite not in self.horizons:
            raise ProtocolError(
                f"protocol {self.name} says nothing of suite {suite}; it covers {', '.join(self.horizons)}"
            )
        return self.horizons.get(suite, of_task)

    @property
    def pictures(self) -> Pictures:
        """What policies see that were trained on the protocol's pictures."""
        return Pictures(self.orientation, self.jpeg, self.size, self.resize, self.crop_area)  # type: ignore[arg-type]

    def contract(self, world: Contract) -> Contract:
        """The terms of a client that speaks the protocol's own language, in a suite whose terms are `world`.

        The fields of this class keep their own spelling of them, on which fingerprints of results depend.
        """
        state: dict[str, Any] = {"state": "joints", "state_size": STATE_SIZES["joints"]}
        return replace(
            world,
            cameras=self.cameras or world.cameras,
            pictures=self.pictures,
            gripper="open_is_one" if self.gripper == "open_is_1" else world.gripper,
            **(state if self.proprio == "joints" else {}),
        )

    @property
    def fingerprint(self) -> str:
        """Twelve characters that another content does not have."""
        told = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.name}-{self.version}+{self.fingerprint}"


_OPENVLA: Final = EvaluationProtocol(
    "openvla",
    1,
    horizons=HORIZONS,
    settle_steps=10,
    render_size=256,
    orientation="mirrored",
    jpeg=True,
    size=224,
    crop_area=0.9,
    gripper="open_is_1",
    execute=1,
)

#: The embedded suite's, this project's own for LIBERO's suites (pictures upright, of the size and at the rate that
#: the policy's data have), one with LIBERO-Mem's horizon and trials, then those of the public evaluations.
PROTOCOLS: Final[Mapping[str, EvaluationProtocol]] = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol("recall", 1),
        EvaluationProtocol("gym", 1, cameras=()),
        EvaluationProtocol("ipvla", 1, horizons=HORIZONS, settle_steps=10, cameras=_AGENT_AND_WRIST),
        EvaluationProtocol(
            "libero_mem",
            1,
            horizons={"libero_mem": 1000},
            trials=20,
            settle_steps=10,
            cameras=_AGENT_AND_WRIST,
        ),
        _OPENVLA,
        replace(_OPENVLA, name="oft", cameras=_AGENT_AND_WRIST, execute=8),
        EvaluationProtocol(
            "openpi",
            2,
            horizons=HORIZONS,
            world_seed=7,
            settle_steps=10,
            cameras=_AGENT_AND_WRIST,
            render_size=256,
            orientation="mirrored",
            size=224,
            resize="bilinear",
            execute=5,
        ),
        EvaluationProtocol(
            "lerobot",
            2,
            horizons={**HORIZONS, "libero_spatial": 280},
            trials=10,
            world_seed=1000,
            settle_steps=10,
            cameras=_AGENT_AND_WRIST,
            render_size=256,
            orientation="mirrored",
        ),
        EvaluationProtocol(
            "libero_native",
            1,
            horizons=dict.fromkeys(HORIZONS, 600),
            trials=20,
            settle_steps=5,
            settle_action=(0.0,) * 7,
            cameras=_AGENT_AND_WRIST,
            render_size=128,
            orientation="upside_down",
            proprio="joints",
            execute=1,
        ),
    )
}


def load_protocol(name: str) -> EvaluationProtocol:
    """The protocol of this name. ProtocolError if there is none."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    raise ProtocolError(f"{name!r} is no protocol; {did_you_mean(name, PROTOCOLS)}")


def recorded_protocol(recorded: str) -> EvaluationProtocol:
    """The protocol that a result names, `NAME-VERSION+FINGERPRINT`. ProtocolError if it is another one now."""
    protocol = load_protocol(recorded.rpartition("+")[0].rpartition("-")[0])
    if str(protocol) != recorded:
        raise ProtocolError(f"protocol {recorded} is {protocol} here")
    return protocol


def diff(a: EvaluationProtocol, b: EvaluationProtocol) -> dict[str, tuple[Any, Any]]:
    """Field -> (a's, b's), of those in which they are not the same."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(EvaluationProtocol)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
