"""The tables of `benchmarks.rollout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from benchmarks.markdown import head, line
from benchmarks.record import read_record, where
from benchmarks.rollout_capacity import PI0, Constants, forward_on_gpu, gpus_for, limits
from benchmarks.rollout_pictures import OTHER_LEVELS, SEEN_LEVELS
from benchmarks.rollout_scaling import CHUNK_S, CORES_ARE_THE_LIMIT, FORWARDS

_SIMULATORS, _GPUS = 1000, 8


def speed_table(figures: Mapping[str, Any]) -> str:
    """Milliseconds per control step, and what the cores did meanwhile."""
    speed = figures["speed"]
    ms = speed["ms_per_step"]
    rows = head("", "ms per control step", "against serial", "efficiency", "mean batch")
    rows.append(line("serial loop", f"{median(ms['serial']):.0f}", "", "", "1"))
    for profile, played in speed["service"].items():
        ratio = median(serial / one for serial, one in zip(ms["serial"], ms[profile], strict=True))
        rows.append(
            line(
                f"service, `{profile}`",
                f"{median(ms[profile]):.1f}",
                f"{ratio:.1f} x",
                f"{median(speed['efficiency'][profile]):.2f}",
                f"{median(one['mean_batch'] for one in played):.2f}",
            )
        )
    return "\n".join(
        [
            *rows,
            "",
            f"`{speed['suite']}`, protocol {speed['protocol']}, {speed['num_simulators']} simulators on "
            f"{speed['cores']} cores; medians of {len(ms['serial'])} rounds. {where(speed['run'])}",
        ]
    )


def overhead_table(figures: Mapping[str, Any]) -> str:
    """What an answer takes beyond the policy."""
    overhead = figures["overhead"]
    names = {
        "bare": "Ray: a call of an actor that does nothing",
        "1": "service, one caller",
        "8": "service, eight",
    }
    rows = head("", "ms per answer beyond the policy", "least and most of the rounds")
    for name, ms in overhead["ms"].items():
        rows.append(line(names[name], f"{median(ms):.2f}", f"{min(ms):.2f} to {max(ms):.2f}"))
    told = f"Two pictures of 224 px per call; medians of {len(overhead['ms']['1'])} rounds."
    return "\n".join([*rows, "", f"{told} {where(overhead['run'])}"])


def pictures_table(figures: Mapping[str, Any]) -> str:
    """How far `fast` is from `exact`."""
    pictures = figures["pictures"]
    rows = head(
        "suite",
        "camera",
        "mean difference, levels of 255",
        "of the picture that differs most",
        f"pixels that differ by more than {SEEN_LEVELS} levels",
        f"by more than {OTHER_LEVELS}",
    )
    rows += [
        line(
            f"`{one['suite']}`",
            one["camera"],
            f"{one['mean_levels']:.1f}",
            f"{one['worst_levels']:.1f}",
            f"{one['seen']:.1%}",
            f"{one['other']:.1%}",
        )
        for one in pictures["differences"]
    ]
    told = f"{pictures['differences'][0]['pictures']} pictures of 256 px per row, settled and in motion."
    return "\n".join([*rows, "", f"{told} {where(pictures['run'])}"])


def scaling_table(figures: Mapping[str, Any]) -> str:
    """Answers per second by number of simulators."""
    points = figures["scaling"]["points"]
    headings = (f"{name}: {what}" for what in ("answers/s", "of the bound", "of the ideal") for name in FORWARDS)
    rows = head("simulators", *headings)
    for actors in sorted({point["actors"] for point in points}):
        told = {point["forward"]: point for point in points if point["actors"] == actors}
        rates = (f"{told[name]['answers_per_s']:.1f}" for name in FORWARDS)
        shares = (_share(told[name], of) for of in ("to_bound", "to_ideal") for name in FORWARDS)
        rows.append(line(str(actors), *rates, *shares))
    times = "; ".join(
        f"{name}: {1e3 * forward.fixed_s:.0f} + {1e3 * forward.per_row_s:g} b ms for a batch of b"
        for name, forward in FORWARDS.items()
    )
    return "\n".join(
        [
            *rows,
            "",
            f"Simulators that wait {CHUNK_S:g} s (give or take 30 %) per chunk of 8 control steps; policies that "
            f"wait, {times}. In brackets the share of the cores' time, where it is above "
            f"{CORES_ARE_THE_LIMIT:.0%} and so the limit. {where(figures['scaling']['run'])}",
        ]
    )


def capacity_table(figures: Mapping[str, Any]) -> str:
    """Where a cluster saturates."""
    cells = (
        "profile",
        "policy",
        "simulators",
        "GPUs",
        "policy's passes",
        "replicas' loops",
        "driver",
        "reached",
        "full first",
        "MB/s",
        f"GPUs for {_SIMULATORS:,}",
    )
    rows = head(*cells)
    forwards = {"pi0, RTX 4090": PI0}
    if (gpu := read_record("gpu")) is not None:
        acting = gpu["figures"]["acting"]
        forwards[f"3B with a GRU, {acting['device'].removeprefix('NVIDIA ')}"] = forward_on_gpu(gpu["figures"])
    for policy, forward in forwards.items():
        for profile in ("exact", "fast"):
            constants = Constants.of(figures, profile)
            found = limits(constants, _SIMULATORS, _GPUS, forward)
            limited = (found.policy, found.actors, found.driver, found.reached)
            rows.append(
                line(
                    f"`{profile}`",
                    policy,
                    f"{found.simulators:,.0f}",
                    str(_GPUS),
                    *(f"{rate:,.0f}" for rate in limited),
                    found.fullest,
                    f"{found.network_mb_per_s:,.0f}",
                    str(gpus_for(constants, _SIMULATORS, forward=forward)),
                )
            )
    constants = Constants.of(figures)
    return "\n".join(
        [
            *rows,
            "",
            "Answers per second, 8 control steps each, at which each part of a cluster of "
            f"{_SIMULATORS:,} simulators (a core each) and {_GPUS} GPUs is full, the observations that then "
            f"cross the network, and the GPUs with which {_SIMULATORS:,} simulators give nine tenths of what they "
            "can. Measured on this page's machine: "
            f"{constants.chunk_s:.2f} s of a core per chunk with `exact`, {1e3 * constants.answer_s:.1f} ms of a "
            f"replica per answer, {1e3 * constants.driver_s:.1f} ms of the driver per episode.",
        ]
    )


def chaos_table(figures: Mapping[str, Any]) -> str:
    """What was killed, and what it cost."""
    chaos = figures["chaos"]
    kills = ", ".join(f"{count} x {kind}" for kind, count in sorted(chaos["kills"].items()))
    return "\n".join(
        [
            *head("episodes", "killed", "attempts more", "lost", "doubled", "different", "wall time"),
            line(
                str(chaos["episodes"]),
                kills,
                str(chaos["attempts"]),
                str(chaos["lost"]),
                str(chaos["doubled"]),
                str(chaos["different"]),
                f"{chaos['disturbed_s']:.0f} s against {chaos['undisturbed_s']:.0f} s undisturbed",
            ),
            "",
            where(chaos["run"]),
        ]
    )


def soak_table(figures: Mapping[str, Any]) -> str:
    """Memory of every process."""
    soak = figures["soak"]
    rows = head("process", "own memory at the end, MB", "MB per 1,000 episodes", "open files more")
    rows += [
        line(
            process["kind"],
            f"{process['memory_mb']:.0f}",
            f"{process['slope_mb_per_1000']:.2f}",
            str(process["files"]),
        )
        for process in soak["processes"]
    ]
    held = f"{soak['object_store_mb']:.0f} MB of Ray's object store"
    left = f"left behind: {soak['leases']} leases, {soak['actors']} actors after it was closed, {held}"
    played = f"{soak['episodes']:,} episodes in {soak['wall_s'] / 60:.0f} minutes"
    return "\n".join([*rows, "", f"{played}; {soak['replaced']} processes replaced; {left}. {where(soak['run'])}"])


def _share(point: Mapping[str, Any], of: str) -> str:
    limited = f" ({point['cpu']:.0%})" if point["cpu"] >= CORES_ARE_THE_LIMIT else ""
    return f"{point[of]:.2f}{limited}"


ROLLOUT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "speed": speed_table,
    "overhead": overhead_table,
    "pictures": pictures_table,
    "scaling": scaling_table,
    "capacity": capacity_table,
    "chaos": chaos_table,
    "soak": soak_table,
}
