"""What single linear modules see and pass on: input and output-gradient second moments from one teacher pass.

For y = W x at the positions that the output depends on (the others, padding among them, have no gradient):

    A = E[x x'] [in, in],   G = E[g g'] [out, out],   g = d(-log p(label)) / d y,   label ~ p

the two Kronecker factors of the module's Fisher information (Martens and Grosse, arXiv 1503.05671), each scaled to
trace = dimension, so that one strength suits all modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipvla.forgetting.artifact import Measured, identity_of
from ipvla.forgetting.probed import ProbedModel, inputs, sampled_gradients


@dataclass(frozen=True)
class ModuleStatistics(Measured):
    """Second moments of linear modules, float64 on the CPU, symmetric, trace = dimension.

    Attributes:
        modules: name -> (A [in, in], G [out, out]); on disk NAME.A and NAME.G.
    """

    name: ClassVar[str] = "module_statistics"
    contents: ClassVar[str] = "module statistics"
    request: ClassVar[str] = "--adapters as model.lora"

    modules: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def of_inputs(self) -> dict[str, Tensor]:
        """Name -> A [in, in]."""
        return {name: of_inputs for name, (of_inputs, _) in self.modules.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, (of_inputs, of_gradients) in self.modules.items():
            named |= {f"{name}.A": of_inputs, f"{name}.G": of_gradients}
        return named

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(meta, {name: (tensors[f"{name}.A"], tensors[f"{name}.G"]) for name in meta["modules"]})


def collect(
    model: ProbedModel,
    batches: Sequence[Any],
    modules: Mapping[str, nn.Module],
    meta: Mapping[str, Any],
    *,
    labels: int = 1,
    seed: int = 0,
) -> ModuleStatistics:
    """Statistics of the teacher's `modules` over the probe's batches, `labels` sampled per record.

    Args:
        modules: name -> an nn.Linear of the model that runs once in a forward pass.
        meta: at least `probe_sha256` and `commit`.

    Raises:
        ValueError: meta lacks these, a module is not linear, or no gradient reaches it.
    """
    identity = identity_of(model, meta)
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}; statistics are of nn.Linear modules")
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    moments = {
        name: [torch.zeros(size, size, dtype=torch.float64) for size in (m.in_features, m.out_features)]
        for name, m in linear.items()
    }
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        with inputs(linear, first=True) as rows_of:  # a head may run the model again, to write on
            _, sampled = sampled_gradients(model, batch, linear, labels, generator)
        for gradients in sampled:
            for name, gradient in gradients.items():
                reached = gradient.ne(0).any(-1)
                for moment, rows in zip(moments[name], (rows_of[name], gradient), strict=True):
                    chosen = rows[reached].double()
                    moment.add_((chosen.T @ chosen).cpu())
    sampling = {"labels": labels, "seed": seed, "versions": {"torch": torch.__version__}}
    normalised = {name: (_normalised(a, name), _normalised(g, name)) for name, (a, g) in moments.items()}
    return ModuleStatistics({**meta, **identity, **sampling, "modules": list(normalised)}, normalised)


def _normalised(moment: Tensor, name: str) -> Tensor:
    trace = moment.trace().item()
    if not 0 < trace < math.inf:
        raise ValueError(
            f"the moments of {name} have trace {trace}; leave out a module that the output does not depend on, "
            "or check the teacher's weights"
        )
    return moment * (len(moment) / trace)
