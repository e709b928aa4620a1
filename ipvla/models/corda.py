"""PEFT's CorDA: LoRA that begins in the directions that matter least to the teacher (arXiv 2406.05223)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ipvla.models.backbones.protocol import Backbone


def begin_by_corda(backbone: Backbone, covariances: Mapping[str, Tensor]) -> None:
    """Splits each adapted weight W, in the knowledge-preserved mode, into a frozen part and (alpha / r) B A.

    Of W = (U S V') C^-1, where U S V' is the singular value decomposition of W C, the last r terms go into B A and
    the rest stays in W. The function stays as it is, up to rounding; the base weights do not.

    Args:
        backbone: with LoRA adapters on linear modules.
        covariances: by module name, second moment C [in, in] of the teacher's inputs; their scale is of no matter.

    Raises:
        ValueError: a module has no covariance, one of another size, or fewer than r singular values.
    """
    import peft  # takes seconds
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

    prefix = "base_model.model."
    for path, layer in backbone.vlm.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            name, rank = path.removeprefix(prefix), layer.r["default"]
            linear = layer.get_base_layer()
            width, least = linear.weight.shape[1], min(linear.weight.shape)
            if name not in covariances or covariances[name].shape != (width, width):
                shape = list(covariances[name].shape) if name in covariances else "absent"
                raise ValueError(
                    f"the covariance of {name} is {shape}, its weight needs [{width}, {width}]; "
                    "collect the module statistics of this model with --adapters as model.lora"
                )
            if rank > least:
                raise ValueError(f"lora.rank is {rank}, but {name} has {least} singular values; lower it")
            linear.covariance_matrix = covariances[name].to(linear.weight.device, torch.float32)
            all_of_it = collect_eigens_for_layer(linear, None)
            del linear.covariance_matrix
            linear.eigens = CordaEigens(
                S_WC=all_of_it.S_WC[-rank:].clone(),
                U_WC=all_of_it.U_WC[:, -rank:].to(linear.weight.device),
                V_WC=all_of_it.V_WC[:, -rank:].to(linear.weight.device),
            )
            with torch.no_grad():
                layer.corda_init("default", "corda")
