"""The tables of `benchmarks.data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import head, line


def reading_table(figures: Mapping[str, Any]) -> str:
    """Every reader's medians."""
    rows = head("reader", "pictures per CPU-second", "resident MB", "seconds to the first episode")
    for name, told in figures["reading"].items():
        rate = f"{told['pictures_per_cpu_s']:.0f} ({told['least']:.0f} to {told['most']:.0f})"
        rows.append(line(name, rate, f"{told['rss_mb']:.0f}", f"{told['first_s']:.2f}"))
    data, lanes = figures["dataset"], figures["lanes_rss_mb"]
    told = (
        f"{data['episodes']} episodes of {data['steps']} steps, {data['cameras']} JPEG pictures of "
        f"{data['pixels']} px each. A process that trains on windows of them holds "
        f"{', '.join(f'{mb:.0f}' for mb in lanes)} MB after one, two and three epochs. "
        f"To find an episode among a million takes {figures['lookup_us']:.1f} microseconds."
    )
    return "\n".join([*rows, "", told])


def scale_table(figures: Mapping[str, Any]) -> str:
    """An epoch on paper."""
    rows = head(
        *(
            "workers",
            "windows",
            "idle",
            "read, TB",
            "requests",
            "MB per worker",
            "CPU-hours to read",
            "planning, s",
        )
    )
    for told in figures["scale"]:
        rows.append(
            line(
                str(told["workers"]),
                f"{told['windows']:,}",
                f"{told['idle_share']:.2%}",
                f"{told['terabytes']:.1f}",
                f"{told['requests']:,}",
                f"{told['worker_mb']:.0f}",
                f"{told['cpu_hours']:.0f}",
                f"{told['planning_s']:.1f}",
            )
        )
    return "\n".join(rows)


DATA: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"reading": reading_table, "scale": scale_table}
