"""The tables of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from benchmarks.markdown import head, line
from benchmarks.record import where


def acting_table(figures: Mapping[str, Any]) -> str:
    """Milliseconds of an act by batch, and what an episode more costs."""
    acting = figures["acting"]
    batches = list(next(iter(acting["memories"].values()))["ms"])
    rows = head("memory", *(f"batch {batch}, ms" for batch in batches), "ms per episode more", "bytes per episode")
    rows += [
        line(
            name,
            *(f"{median(ms):.1f}" for ms in told["ms"].values()),
            f"{told['per_row_ms']:.2f}",
            f"{told['memory_bytes']:,}",
        )
        for name, told in acting["memories"].items()
    ]
    views = f"{acting['pictures']} picture of {acting['pixels']} px per step"
    return "\n".join([*rows, "", f"{views}, medians, {acting['device']}. {where(acting['run'])}"])


def tuning_table(figures: Mapping[str, Any]) -> str:
    """Milliseconds of a step with and without protection, and memory."""
    tuning = figures["tuning"]
    costs, peaks = tuning["costs"], tuning["peak_gib"]
    headings = ("ms per step", "against unprotected", "largest memory, GiB")
    rows = head(f"LoRA, rank {tuning['lora_rank']}", *headings)
    rows += [
        line("unprotected", f"{costs['baseline_ms']:.1f}", "", _gib(peaks["baseline"])),
        line("HSW", f"{costs['method_ms']:.1f}", _interval(costs["hsw_step_ratio"]), _gib(peaks["method"])),
        line("HSW, activations computed again", "", "", _gib(peaks["checkpointed"])),
    ]
    told = (
        f"{tuning['frames']} frames per step: {tuning['frames_per_s']:.0f} frames per second with HSW. A reading "
        f"of the Thermostat takes {costs['reading_ms']:.0f} ms, one every {costs['every']} steps: "
        f"{_interval(costs['thermostat_step_ratio'])} of the step. {tuning['device']}. {where(tuning['run'])}"
    )
    return "\n".join([*rows, "", told])


def _interval(told: Mapping[str, float]) -> str:
    return f"{told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


GPU: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"acting": acting_table, "tuning": tuning_table}
