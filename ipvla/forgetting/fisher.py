"""The diagonal of a teacher's Fisher information: how much its output depends on each weight. Offline, once.

    F_i = mean over records and labels of (d(-log p(y | x)) / d theta_i)^2,   y ~ p(. | x)

exactly: the gradient is of one record at a time (all its tokens together), and labels are sampled from the
teacher's own output. (The squared gradient of a batch, or of recorded actions, is another quantity: Kunstner,
Balles and Hennig, arXiv 1905.12558.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipvla.forgetting.artifact import Measured, identity_of
from ipvla.forgetting.probed import ProbedModel


@dataclass(frozen=True)
class FisherConfig:
    """What is measured.

    Attributes:
        weights: "adapters", those that get an adapter, or "all" of the policy, for fine-tuning without adapters.
        labels: sampled per record.
        seed: of the labels.
    """

    weights: str = "adapters"
    labels: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in ("adapters", "all"):
            raise ValueError(f'fisher.weights is {self.weights!r}; choose "adapters" or "all"')
        if self.labels < 1:
            raise ValueError(f"fisher.labels is {self.labels}; it must be at least 1")


@dataclass(frozen=True)
class DiagonalFisher(Measured):
    """F of weights.

    Attributes:
        weights: by the weight's name in the policy's model, float32 on the CPU, of the weight's shape.
    """

    name: ClassVar[str] = "fisher"
    contents: ClassVar[str] = "Fisher information"
    request: ClassVar[str] = "--fisher.weights adapters (or all)"

    weights: Mapping[str, Tensor]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(meta, tensors)

    @classmethod
    def measure(
        cls,
        model: ProbedModel,
        records: Iterable[Any],
        weights: Mapping[str, nn.Parameter],
        meta: Mapping[str, Any],
        config: FisherConfig,
    ) -> Self:
        """Of the teacher's `weights`; one backward pass per record and label, with room for one more gradient.

        Args:
            records: batches of one record each.
            weights: of the model that is read; what the output does not depend on gets 0.
            meta: at least `probe_sha256` and `commit`.

        Raises:
            ValueError: meta lacks these, a batch has several records, there is none, or an output is not finite.
        """
        identity = identity_of(model, meta)
        generator = torch.Generator().manual_seed(config.seed)
        trained = {name: weight.requires_grad for name, weight in weights.items()}
        totals = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        count = 0
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for record in records:
                for gradients in _gradients(model, record, list(weights.values()), config.labels, generator):
                    count += 1
                    for total, gradient in zip(totals.values(), gradients, strict=True):
                        if gradient is not None:
                            total.add_(gradient.float().square())
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(trained[name])
        if not count:
            raise ValueError("the probe has no record; give at least one")
        means = {name: (total / count).cpu() for name, total in totals.items()}
        meta = {**meta, **identity, **asdict(config), "versions": {"torch": torch.__version__}}
        return cls(meta, means)


def _gradients(
    model: ProbedModel, record: Any, weights: list[nn.Parameter], labels: int, generator: torch.Generator
) -> Iterator[tuple[Tensor | None, ...]]:
    with torch.enable_grad():
        output = model.read(record).output
        if len(output) != 1:
            raise ValueError(f"a batch has {len(output)} records; the Fisher information takes one at a time")
        if not output.isfinite().all():
            raise ValueError("the model's output is not finite; check its weights and precision")
        for _ in range(labels):
            loss = model.sampled_loss(output, generator)
            yield torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
