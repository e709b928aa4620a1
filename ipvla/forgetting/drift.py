"""How far a student has moved from its teacher, read on the probe without the teacher at hand.

The artifact holds the teacher's pooled instruction vectors of every record of the probe; a reading draws a few
records, pools the student's vectors of the same records, and compares covariances, d = ||C_S - C_T||_F (the
requirement, 2.3). With C_T of the *same* records (paired) the reading is exactly 0 while the student is the
teacher; with C_T of the whole probe (unpaired) it has a floor of sampling noise that hides small drift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ipvla.forgetting.artifact import ArtifactError, read_artifact, write_artifact
from ipvla.forgetting.probed import ProbedModel, instruction_mean

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drift:
    """One reading, each a mean over the representative layers; NaN where the student's vectors are.

    Attributes:
        paired: ||C_S - C_T||_F / ||C_T||_F, both of the drawn records; 0 exactly for the teacher itself.
        unpaired: ||C_S - C_T||_F with C_T of the whole probe, in squared units of the hidden state.
        unpaired_relative: the same over each layer's ||C_T||_F.
    """

    paired: float
    unpaired: float
    unpaired_relative: float


def pool(model: ProbedModel, batch: Any, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """(float64 [B, D] by layer, bool [B] of empty masks), both on the CPU, of one pass without gradients."""
    with torch.no_grad():
        reading = model.read(batch)
        pooled = {layer: instruction_mean(reading.hidden[layer], reading.mask) for layer in layers}
    return {layer: p.cpu() for layer, p in pooled.items()}, ~reading.mask.any(1).cpu()


class DriftProbe:
    """The teacher's vectors, and readings against them.

    Args:
        teacher: by representative layer, float64 [N, D], row i of the probe's record i.
        empty: bool [N], records without instruction tokens; they are never drawn.

    Raises:
        ValueError: no layer, rows that do not match, fewer than two usable records, or vectors that are not finite
            or all alike.
    """

    def __init__(self, teacher: Mapping[int, Tensor], empty: Tensor) -> None:
        if not teacher:
            raise ValueError("a drift probe needs the vectors of at least one representative layer, got none")
        self.teacher = {layer: vectors.detach().cpu().double() for layer, vectors in teacher.items()}
        self.empty = empty.detach().cpu()
        usable = (~self.empty).nonzero()[:, 0]
        self.usable: IntArray = usable.numpy()
        if len(self.usable) < 2:
            raise ValueError(f"{len(self.usable)} of {len(empty)} probe records have instruction tokens; give 2")
        self._centred: dict[int, Tensor] = {}
        self._norm: dict[int, float] = {}
        for layer, vectors in self.teacher.items():
            if vectors.ndim != 2 or len(vectors) != len(self.empty):
                raise ValueError(
                    f"the teacher's vectors of layer {layer} are {list(vectors.shape)}; "
                    f"give [{len(self.empty)}, D], a row for each record"
                )
            x = self._centred[layer] = _centre(vectors[usable])
            self._norm[layer] = _norm(x, x) / (len(x) - 1)
            if not 0 < self._norm[layer] < math.inf:
                raise ValueError(
                    f"the teacher's vectors of layer {layer} have a covariance of norm {self._norm[layer]}; "
                    "give a probe with different instructions and a teacher without NaN"
                )

    @classmethod
    def measure(cls, model: ProbedModel, batches: Sequence[Any], layers: Sequence[int]) -> Self:
        """From one pass of the teacher over the whole probe, in the order of its records."""
        parts = [pool(model, batch, layers) for batch in batches]
        if not parts:
            raise ValueError("the probe has no batch; give at least one")
        teacher = {layer: torch.cat([vectors[layer] for vectors, _ in parts]) for layer in layers}
        return cls(teacher, torch.cat([empty for _, empty in parts]))

    def indices(self, batch: int, seed: int, step: int) -> IntArray:
        """Records of the reading at `step`, int64 [batch], ascending, none twice; the same for the same arguments.

        Raises:
            ValueError: batch < 2, or the probe has fewer usable records.
        """
        if not 2 <= batch <= len(self.usable):
            raise ValueError(
                f"a drift reading of {batch} records from a probe of {len(self.usable)} usable ones; "
                "lower the batch (at least 2) or make a larger probe"
            )
        return np.sort(np.random.default_rng((seed, step)).choice(self.usable, batch, replace=False))

    def read(self, student: Mapping[int, Tensor], indices: IntArray) -> Drift:
        """The drift of a student whose pooled vectors of records `indices` are float64 [len(indices), D] by layer.

        Raises:
            ValueError: a layer is missing or of another shape, a record has no instruction tokens, or to the
                teacher these records are all alike.
        """
        rows = torch.from_numpy(indices)
        if len(rows) < 2 or self.empty[rows].any():
            raise ValueError(f"records {indices.tolist()} cannot be read; take those that `indices` draws")
        readings = [self._read_layer(layer, student, rows) for layer in self.teacher]
        return Drift(*np.mean(readings, axis=0).tolist())

    def sigma(self, batch: int, draws: int, seed: int, student: Mapping[int, Tensor] | None = None) -> float:
        """Standard deviation of readings over `draws` draws of `batch` records, by sampling alone.

        Without a student: of the teacher's own `unpaired_relative` readings, the noise that hides drift in the
        form of the requirement. Paired readings of the teacher are 0; what they scatter by grows with the drift
        and is measured, as `paired`, where a student's vectors of the whole probe (float64 [N, D] by layer) are
        given.

        Raises:
            ValueError: fewer than 2 draws, or as `indices` and `read`.
        """
        if draws < 2:
            raise ValueError(f"a standard deviation of {draws} draws; make it at least 2")
        vectors = self.teacher if student is None else student
        readings = []
        for draw in range(draws):
            indices = self.indices(batch, seed, draw)
            drift = self.read({layer: v[torch.from_numpy(indices)] for layer, v in vectors.items()}, indices)
            readings.append(drift.unpaired_relative if student is None else drift.paired)
        return float(np.std(readings, ddof=1))

    def save(self, directory: Path, meta: Mapping[str, Any]) -> None:
        """Writes `drift.safetensors` and `drift.json`; `meta` (JSON) says at least backbone and probe_sha256."""
        tensors = {f"vectors{layer}": vectors for layer, vectors in self.teacher.items()} | {"empty": self.empty}
        write_artifact(directory, "drift", tensors, {**meta, "layers": list(self.teacher)})

    @classmethod
    def load(
        cls, directory: Path, *, backbone: str, layers: Sequence[int], probe_sha256: str | None = None
    ) -> Self:
        """What `save` wrote, if it is of this backbone, these layers and (where given) this probe.

        Raises:
            ArtifactError: it is missing, damaged, or of something else.
        """
        expected = {"backbone": backbone, "layers": list(layers), "probe_sha256": probe_sha256}
        tensors, _ = read_artifact(directory, "drift", expected)
        try:
            return cls({layer: tensors[f"vectors{layer}"] for layer in layers}, tensors["empty"])
        except KeyError as error:
            raise ArtifactError(f"{directory / 'drift.safetensors'} lacks {error}; make it again") from None

    def _read_layer(self, layer: int, student: Mapping[int, Tensor], rows: Tensor) -> tuple[float, float, float]:
        same, whole = self.teacher[layer][rows], self._centred[layer]
        vectors = student.get(layer)
        if vectors is None or vectors.shape != same.shape:
            raise ValueError(
                f"the student's vectors of layer {layer} are {None if vectors is None else list(vectors.shape)}; "
                f"this reading compares {list(same.shape)}"
            )
        vectors = vectors.detach().cpu().double()
        s, t, moved = _centre(vectors), _centre(same), _centre(vectors - same)
        norm = _norm(t, t)
        if norm == 0:
            raise ValueError(f"the teacher's vectors of records {rows.tolist()} are all alike; draw more records")
        # C_S - C_T = s'moved + moved't: no difference of nearly equal numbers, and zeros where nothing moved.
        paired = _norm(torch.cat([s, moved]), torch.cat([moved, t])) / norm
        c, c_t, scale = _norm(s, s) / (len(s) - 1), self._norm[layer], (len(s) - 1) * (len(whole) - 1)
        unpaired = _root(c**2 + c_t**2 - 2 * (s @ whole.T).square().sum().item() / scale)
        return paired, unpaired, unpaired / c_t


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _norm(a: Tensor, b: Tensor) -> float:
    """||a'b||_F of a, b float64 [n, D], by their Gram matrices: nothing of size D x D is formed."""
    return _root(((a @ a.T) * (b @ b.T)).sum().item())


def _root(square: float) -> float:
    """Of what is a square but for rounding; NaN stays NaN."""
    return math.sqrt(max(square, 0.0))
