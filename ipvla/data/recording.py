"""How a dataset was recorded, as far as neither its features nor its name say it: a file beside its data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from ipvla.contract import ORIENTATIONS, Contract, Orientation, Pictures
from ipvla.data.source import DatasetError, EpisodeSource, file_system
from ipvla.files import one_line, record_of, write_text

RECORDING_FILE: Final = "recording.json"
#: How the description begins of a dataset that this project wrote from its own simulators.
OWN_DESCRIPTION: Final = "Demonstrations recorded by ipvla"


@dataclass(frozen=True)
class Recording:
    """What `RECORDING_FILE` holds.

    Attributes:
        orientation: of the pictures.
        control_hz: control steps per second; None if unknown.
        pictures_every: control steps from one new picture to the next; between them the last one is repeated.
        terms: on which it was recorded, where these are not LIBERO's hand's; cameras by the simulator's names.
        depth_unit_m: metres per unit of recorded depth; None if there is none, or nothing tells, and then it is
            taken for millimetres.
    """

    orientation: Orientation = "unknown"
    control_hz: float | None = None
    pictures_every: int = 1
    terms: Contract | None = None
    depth_unit_m: float | None = None

    def save(self, directory: Path) -> None:
        """Writes the file into a dataset's directory."""
        values = asdict(self)
        if self.depth_unit_m is None:
            del values["depth_unit_m"]
        write_text(directory / RECORDING_FILE, json.dumps(values))

    def over(self, contract: Contract) -> Contract:
        """`contract` with what is known here."""
        if (terms := self.terms) is not None and terms.action_size == contract.action_size:
            state = terms.state if terms.state_size == contract.state_size else "unknown"
            contract = replace(contract, action=terms.action, clipped=terms.clipped, state=state)
        if self.orientation != "unknown":
            contract = replace(contract, pictures=Pictures(self.orientation))
        return contract if self.control_hz is None else replace(contract, control_hz=self.control_hz)

    @classmethod
    def of(cls, source: EpisodeSource) -> Self:
        """What is known of a dataset.

        Without a file: those of this project's own writer are upright at 20 Hz, and LeRobot's state their rate.

        Raises:
            DatasetError: the file is damaged.
        """
        own = getattr(source, "recording", None)
        if isinstance(own, cls):
            return own
        files, root = file_system(source.location)
        if files.exists(path := f"{root}/{RECORDING_FILE}"):
            if not files.isfile(path):
                raise DatasetError(f"{path} is no file; delete it, or write it anew")
            return cls._read(path, files.cat_file(path))
        if files.exists(path := f"{root}/dataset_info.json"):
            described = _json(path, files.cat_file(path)).get("description", "")
            return cls("upright", 20.0) if str(described).startswith(OWN_DESCRIPTION) else cls()
        fps = getattr(source, "fps", None)
        return cls(control_hz=float(fps) if fps else None)

    @classmethod
    def _read(cls, path: str, content: bytes) -> Self:
        values = _json(path, content)
        if values.get("orientation") not in ORIENTATIONS:
            raise DatasetError(
                f"{path}: orientation is {values.get('orientation')!r:.60}; write one of {', '.join(ORIENTATIONS)}"
            )
        hz = values.get("control_hz")
        if hz is not None and not (isinstance(hz, int | float) and 0 < hz < math.inf):
            raise DatasetError(f"{path}: control_hz is {hz!r:.60}; write control steps per second, or null")
        every = values.get("pictures_every", 1)
        if not isinstance(every, int) or every < 1:
            raise DatasetError(f"{path}: pictures_every is {every!r:.60}; write control steps, 1 or more")
        terms = values.get("terms")
        try:
            known = None if terms is None else Contract.from_dict(terms)
        except ValueError as error:
            raise DatasetError(f"{path}: terms: {error}; delete that entry") from None
        unit = values.get("depth_unit_m")
        if unit is not None and not (isinstance(unit, int | float) and 0 < unit < math.inf):
            raise DatasetError(f"{path}: depth_unit_m is {unit!r:.60}; write metres per unit of depth, or null")
        return cls(values["orientation"], None if hz is None else float(hz), every, known, unit)


def _json(path: str, content: bytes) -> dict[str, Any]:
    try:
        return record_of(content)
    except ValueError as error:
        raise DatasetError(
            f"{path} is no JSON object ({one_line(error)}); delete that file, or write it anew"
        ) from None
