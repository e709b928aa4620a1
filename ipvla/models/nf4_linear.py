"""A linear layer of bitsandbytes whose 4-bit weight is saved and loaded like any other weight.

bitsandbytes packs what describes a weight into one tensor of JSON, whose size depends on a number in it. Here the
weight and its scales are tensors of fixed shapes, so that a file is compared with a model before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Self

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

#: Numbers that share a scale, and scales that share a scale of theirs (arXiv 2305.14314).
BLOCK: Final = 64
NESTED_BLOCK: Final = 256


class NF4Linear(Linear4bit):
    """Its state dict has `weight` uint8 [numbers / 2, 1] and `bias` if there is one, and beside them

    - `weight.absmax`: of each block of 64 numbers, uint8 [blocks], float32 without double quantisation.
    - `weight.nested_absmax`: float32 [blocks / 256], with double quantisation.
    - `weight.nested_offset`: float32 [], with double quantisation.
    """

    def __init__(self, linear: nn.Linear, double: bool, compute: torch.dtype) -> None:
        """Quantises a layer's weight; of one on device `meta` it takes the place until weights are loaded."""
        super().__init__(1, 1, bias=False, compute_dtype=compute, compress_statistics=double, quant_type="nf4")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        if weight.is_meta:
            numbers, state = _empty(weight, double, torch.device("meta"))
        else:
            fast = weight.cuda() if torch.cuda.is_available() else weight  # a CPU takes 0.1 s per million
            numbers, state = quantize_4bit(fast, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
            numbers = numbers.to(weight.device)
            state.to(weight.device)
        self._hold(numbers, state)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.train(linear.training)
        # The layout for CPUs with AVX-512 carries no gradient, and would stay once a policy has answered.
        self.support_avx512bf16_for_cpu = False

    def dequantised(self) -> nn.Linear:
        """An ordinary layer with the numbers that this one multiplies by, in the dtype that it was made from."""
        state = self.weight.quant_state
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False, dtype=state.dtype)
        linear.weight = nn.Parameter(dequantize_4bit(self.weight.data, state))
        linear.bias = self.bias
        return linear.train(self.training)

    def _hold(self, numbers: torch.Tensor, state: Any) -> None:
        self.weight = Params4bit(
            numbers, requires_grad=False, quant_state=state, blocksize=BLOCK,
            compress_statistics=state.nested, quant_type="nf4", bnb_quantized=True, module=self,
        )  # fmt: skip
        self.quant_state = state

    def _scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        state = self.weight.quant_state
        yield "weight.absmax", state.absmax
        if state.nested:
            yield "weight.nested_absmax", state.state2.absmax
            yield "weight.nested_offset", state.offset

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination |= {f"{prefix}{name}": scale for name, scale in self._scales()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        scales = dict(self._scales())
        own = {f"{prefix}{name}": name for name in ("weight", *scales)}
        given = {name: state_dict[key] for key, name in own.items() if key in state_dict}
        missing_keys += [key for key in own if key not in state_dict]
        if len(given) == len(own):
            self._take(given, scales)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        others: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, others, unexpected_keys, error_msgs
        )  # of the bias, which is an ordinary parameter
        missing_keys += [key for key in others if key not in own]

    @torch.no_grad()
    def _take(self, given: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]) -> None:
        if not self.weight.is_meta:
            self.weight.data.copy_(given["weight"])
            for name, scale in scales.items():
                scale.copy_(given[name])
            return
        old = self.weight.quant_state
        like = torch.empty(old.shape, dtype=old.dtype, device="meta")
        numbers = given["weight"].data
        _, state = _empty(like, old.nested, numbers.device)
        state.absmax = given["weight.absmax"]
        if state.nested:
            state.state2.absmax, state.offset = given["weight.nested_absmax"], given["weight.nested_offset"]
        self._hold(numbers, state)

    @classmethod
    def inside(cls, module: nn.Module) -> dict[str, Self]:
        """All of them, by name."""
        return {name: one for name, one in module.named_modules() if isinstance(one, cls)}


def _empty(weight: torch.Tensor, double: bool, device: torch.device) -> tuple[torch.Tensor, Any]:
    """What quantising such a weight gives, with nothing in it but the tables, which are constants."""
    blocks = -(-weight.numel() // BLOCK)
    scales = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32, device=device)
    nested = None
    if double:
        with torch.device("cpu"):
            table = create_dynamic_map().to(device)
        most = torch.empty(-(-blocks // NESTED_BLOCK), device=device)
        nested = QuantState(most, code=table, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = QuantState(
        scales, shape=weight.shape, code=get_4bit_type("nf4", device=device),
        blocksize=BLOCK, quant_type="nf4", dtype=weight.dtype,
        offset=torch.empty((), device=device) if double else None, state2=nested,
    )  # fmt: skip
    return torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=device), state
