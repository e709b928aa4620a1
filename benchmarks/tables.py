"""Makes the tables that README.md and docs/*.md mark, from `benchmarks/results/*.json`, and docs/settings.md.

    python -m benchmarks.tables

A table stands between `<!-- NAME KIND -->` and `<!-- /NAME KIND -->`, as in `<!-- quickstart success -->`; what is
between the marks is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from benchmarks import rollout_scaling as scaling
from benchmarks.lerobot import speedups
from benchmarks.rollout_pictures import OTHER_LEVELS, SEEN_LEVELS
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.index import generated
from studies.record import RESULTS, read_record
from studies.tables import Figures, ratio, study_table, table, targets_of, where

#: Every page that has a marked table.
PAGES = tuple(
    page
    for page in (SOURCE_TREE / "README.md", *sorted((SOURCE_TREE / "docs").glob("*.md")))
    if "<!-- /" in page.read_text()
)
_SIMULATORS, _GPUS = 1000, 8


def rendered(page: Path) -> str:
    """The page's text with every marked table made anew; one that has no results yet stays as it is."""
    return re.sub(r"<!-- (\w+) (\w+) -->\n.*?<!-- /\1 \2 -->", _marked, page.read_text(), flags=re.DOTALL)


def _marked(mark: re.Match[str]) -> str:
    name, kind = mark[1], mark[2]
    results = RESULTS / f"{name}.json"
    if not results.exists():
        return mark[0]
    record = json.loads(results.read_text())
    if kind in PART_TABLES and kind not in {"capacity", "reading"} and kind not in record["figures"]:
        return mark[0]  # a part that has not run
    return f"<!-- {name} {kind} -->\n{record_table(record, kind)}\n<!-- /{name} {kind} -->"


def record_table(record: Figures, kind: str) -> str:
    """One table of a record, in Markdown. KeyError for a kind that is unknown or has no figures."""
    if kind == "targets":
        return targets_of(record)
    return (PART_TABLES.get(kind) or (lambda figures: study_table(figures, kind)))(record["figures"])


def _reading(figures: Figures) -> str:
    rows = [
        (
            *(name, f"{told['pictures_per_cpu_s']:.0f} ({told['least']:.0f} to {told['most']:.0f})"),
            *(f"{told['rss_mb']:.0f}", f"{told['first_s']:.2f}"),
        )
        for name, told in figures["reading"].items()
    ]
    data, lanes = figures["dataset"], ", ".join(f"{mb:.0f}" for mb in figures["lanes_rss_mb"])
    below = (
        f"{data['episodes']} episodes of {data['steps']} steps, {data['cameras']} JPEG pictures of "
        f"{data['pixels']} px each. A process that trains on windows of them holds {lanes} MB after one, two and "
        f"three epochs. To find an episode among a million takes {figures['lookup_us']:.1f} microseconds."
    )
    return table(("reader", "pictures per CPU-second", "resident MB", "seconds to the first episode"), rows, below)


def _scale(figures: Figures) -> str:
    columns = {
        "workers": ("workers", "{}"),
        "windows": ("windows", "{:,}"),
        "idle_share": ("idle", "{:.2%}"),
        "terabytes": ("read, TB", "{:.1f}"),
        "requests": ("requests", "{:,}"),
        "worker_mb": ("MB per worker", "{:.0f}"),
        "cpu_hours": ("CPU-hours to read", "{:.0f}"),
        "planning_s": ("planning, s", "{:.1f}"),
    }
    rows = [[shape.format(one[name]) for name, (_, shape) in columns.items()] for one in figures["scale"]]
    return table([heading for heading, _ in columns.values()], rows)


def _acting(figures: Figures) -> str:
    acting = figures["acting"]
    batches = list(next(iter(acting["memories"].values()))["ms"])
    rows = [
        (
            *(name, *(f"{median(ms):.1f}" for ms in told["ms"].values())),
            *(f"{told['per_row_ms']:.2f}", f"{told['memory_bytes']:,}"),
        )
        for name, told in acting["memories"].items()
    ]
    headings = ("memory", *(f"batch {batch}, ms" for batch in batches), "ms per episode more", "bytes per episode")
    views = f"{acting['pictures']} picture of {acting['pixels']} px per step"
    return table(headings, rows, f"{views}, medians, {acting['device']}. {where(acting['run'])}")


def _tuning(figures: Figures) -> str:
    tuning = figures["tuning"]
    costs = tuning["costs"]
    gib = {name: "" if value is None else f"{value:.1f}" for name, value in tuning["peak_gib"].items()}
    rows = [
        ("unprotected", f"{costs['baseline_ms']:.1f}", "", gib["baseline"]),
        ("HSW", f"{costs['method_ms']:.1f}", ratio(costs["hsw_step_ratio"]), gib["method"]),
        ("HSW, activations computed again", "", "", gib["checkpointed"]),
    ]
    below = (
        f"{tuning['frames']} frames per step: {tuning['frames_per_s']:.0f} frames per second with HSW. A reading "
        f"of the Thermostat takes {costs['reading_ms']:.0f} ms, one every {costs['every']} steps: "
        f"{ratio(costs['thermostat_step_ratio'])} of the step. {tuning['device']}. {where(tuning['run'])}"
    )
    title = f"LoRA, rank {tuning['lora_rank']}"
    return table((title, "ms per step", "against unprotected", "largest memory, GiB"), rows, below)


def _speed(figures: Figures) -> str:
    speed = figures["speed"]
    ms = speed["ms_per_step"]
    rows = [("serial loop", f"{median(ms['serial']):.0f}", "", "", "1")]
    for profile, played in speed["service"].items():
        faster = median(serial / one for serial, one in zip(ms["serial"], ms[profile], strict=True))
        efficiency, batch = median(speed["efficiency"][profile]), median(one["mean_batch"] for one in played)
        cells = (f"{median(ms[profile]):.1f}", f"{faster:.1f} x", f"{efficiency:.2f}", f"{batch:.2f}")
        rows.append((f"service, `{profile}`", *cells))
    below = (
        f"`{speed['suite']}`, protocol {speed['protocol']}, {speed['num_simulators']} simulators on "
        f"{speed['cores']} cores; medians of {len(ms['serial'])} rounds. {where(speed['run'])}"
    )
    return table(("", "ms per control step", "against serial", "efficiency", "mean batch"), rows, below)


def _sides(figures: Figures) -> str:
    study, versions, same = figures["study"], figures["lerobot"], figures["same"]
    episodes = study["tasks"] * study["trials"]
    names = {"lerobot": f"LeRobot {versions['lerobot']}", "exact": "ours, `exact`", "fast": "ours, `fast`"}
    rows = []
    for side, name in names.items():
        runs = figures["sides"][side]
        cells = [f"{median(3600 * episodes / one['wall_s'] for one in runs):.0f}"]
        cells += [f"{median(one[of] for one in runs) / episodes:.1f}" for of in ("cpu_s", "play_cpu_s")]
        cells += [
            "" if side == "lerobot" else f"{median(speedups(figures, side, of)):.1f} x"
            for of in ("wall_s", "cpu_s", "play_wall_s", "play_cpu_s")
        ]
        rows.append((name, *cells))
    headings = (
        *("", "episodes per hour", "CPU-s per episode", "of them playing"),
        *("faster", "by CPU time", "faster playing", "by CPU time"),
    )
    others = median(one["others"] for runs in figures["sides"].values() for one in runs)
    levels = same["pictures"]
    below = (
        f"`{study['suite']}`, {study['tasks']} tasks of {study['trials']} initial states per run, "
        f"{study['steps']} control steps, chunks of {study['execute']}, two pictures of {study['picture_px']} px, "
        f"{study['lerobot_simulators']} simulators of LeRobot's; medians of {len(figures['sides']['lerobot'])} "
        f"rounds on {figures['cores']} cores, of which other work kept {others:.1f} busy. Over "
        f"{same['observations']} observations the hand is {same['hand_mm']:.3f} mm apart at most, a picture "
        f"{levels['exact']:.1f} levels of 255 with `exact` and {levels['fast']:.1f} with `fast`."
    )
    return table(headings, rows, below)


def _overhead(figures: Figures) -> str:
    names = {
        "bare": "Ray: a call of an actor that does nothing",
        "1": "service, one caller",
        "8": "service, eight",
    }
    by_caller = figures["overhead"]["ms"]
    rows = [
        (names[name], f"{median(ms):.2f}", f"{min(ms):.2f} to {max(ms):.2f}") for name, ms in by_caller.items()
    ]
    below = f"Two pictures of 224 px per call; medians of {len(by_caller['1'])} rounds."
    headings = ("", "ms per answer beyond the policy", "least and most of the rounds")
    return table(headings, rows, f"{below} {where(figures['overhead']['run'])}")


def _pictures(figures: Figures) -> str:
    differences = figures["pictures"]["differences"]
    headings = (
        *("suite", "camera", "mean difference, levels of 255", "of the picture that differs most"),
        *(f"pixels that differ by more than {SEEN_LEVELS} levels", f"by more than {OTHER_LEVELS}"),
    )
    rows = [
        (
            *(f"`{one['suite']}`", one["camera"], f"{one['mean_levels']:.1f}", f"{one['worst_levels']:.1f}"),
            *(f"{one['seen']:.1%}", f"{one['other']:.1%}"),
        )
        for one in differences
    ]
    below = f"{differences[0]['pictures']} pictures of 256 px per row, settled and in motion."
    return table(headings, rows, f"{below} {where(figures['pictures']['run'])}")


def _scaling(figures: Figures) -> str:
    points = {(point["actors"], point["forward"]): point for point in figures["scaling"]["points"]}
    names, full = list(scaling.FORWARDS), scaling.CORES_ARE_THE_LIMIT
    headings = (f"{name}: {what}" for what in ("answers/s", "of the bound", "of the ideal") for name in names)

    def share(point: Figures, of: str) -> str:
        return f"{point[of]:.2f}" + (f" ({point['cpu']:.0%})" if point["cpu"] >= full else "")

    rows = []
    for actors in sorted({actors for actors, _ in points}):
        told = [points[actors, name] for name in names]
        shares = (share(point, of) for of in ("to_bound", "to_ideal") for point in told)
        rows.append((str(actors), *(f"{point['answers_per_s']:.1f}" for point in told), *shares))
    times = "; ".join(
        f"{name}: {1e3 * forward.fixed_s:.0f} + {1e3 * forward.per_row_s:g} b ms for a batch of b"
        for name, forward in scaling.FORWARDS.items()
    )
    below = (
        f"Simulators that wait {scaling.CHUNK_S:g} s (give or take 30 %) per chunk of 8 control steps; policies "
        f"that wait, {times}. In brackets the share of the cores' time, where it is above {full:.0%} and so the "
        f"limit. {where(figures['scaling']['run'])}"
    )
    return table(("simulators", *headings), rows, below)


def _capacity(figures: Figures) -> str:
    headings = (
        *("profile", "policy", "simulators", "GPUs", "policy's passes", "replicas' loops", "driver", "reached"),
        *("full first", "MB/s", f"GPUs for {_SIMULATORS:,}"),
    )
    forwards = {"pi0, RTX 4090": scaling.PI0}
    if (gpu := read_record("gpu")) is not None:
        device = gpu["figures"]["acting"]["device"].removeprefix("NVIDIA ")
        forwards[f"3B with a GRU, {device}"] = scaling.forward_on_gpu(gpu["figures"])
    rows = []
    parts = ("simulators", "policy", "actors", "driver")
    for policy, forward in forwards.items():
        for profile in ("exact", "fast"):
            constants = scaling.Constants.of(figures, profile)
            found = scaling.limits(constants, _SIMULATORS, _GPUS, forward)
            rates = (f"{found[of]:,.0f}" for of in ("policy", "actors", "driver", "reached"))
            fullest = min(parts, key=found.__getitem__)
            needed = scaling.gpus_for(constants, _SIMULATORS, forward=forward)
            cells = (f"{found['simulators']:,.0f}", str(_GPUS), *rates, fullest)
            rows.append((f"`{profile}`", policy, *cells, f"{found['network_mb_per_s']:,.0f}", str(needed)))
    constants = scaling.Constants.of(figures)
    below = (
        "Answers per second, 8 control steps each, at which each part of a cluster of "
        f"{_SIMULATORS:,} simulators (a core each) and {_GPUS} GPUs is full, the observations that then cross "
        f"the network, and the GPUs with which {_SIMULATORS:,} simulators give nine tenths of what they can. "
        f"Measured on this page's machine: {constants.chunk_s:.2f} s of a core per chunk with `exact`, "
        f"{1e3 * constants.answer_s:.1f} ms of a replica per answer, {1e3 * constants.driver_s:.1f} ms of the "
        "driver per episode."
    )
    return table(headings, rows, below)


def _chaos(figures: Figures) -> str:
    chaos = figures["chaos"]
    kills = ", ".join(f"{count} x {kind}" for kind, count in sorted(chaos["kills"].items()))
    counts = (str(chaos[name]) for name in ("attempts", "lost", "doubled", "different"))
    took = f"{chaos['disturbed_s']:.0f} s against {chaos['undisturbed_s']:.0f} s undisturbed"
    headings = ("episodes", "killed", "attempts more", "lost", "doubled", "different", "wall time")
    return table(headings, [(str(chaos["episodes"]), kills, *counts, took)], where(chaos["run"]))


def _soak(figures: Figures) -> str:
    soak = figures["soak"]
    rows = [
        (one["kind"], f"{one['memory_mb']:.0f}", f"{one['slope_mb_per_1000']:.2f}", str(one["files"]))
        for one in soak["processes"]
    ]
    below = (
        f"{soak['episodes']:,} episodes in {soak['wall_s'] / 60:.0f} minutes; {soak['replaced']} processes "
        f"replaced; left behind: {soak['leases']} leases, {soak['actors']} actors after it was closed, "
        f"{soak['object_store_mb']:.0f} MB of Ray's object store. {where(soak['run'])}"
    )
    headings = ("process", "own memory at the end, MB", "MB per 1,000 episodes", "open files more")
    return table(headings, rows, below)


def _training(figures: Figures) -> str:
    training = figures["training"]
    ms, mlflow = training["step_ms"], training["mlflow"]
    ratios = (ratio(training[name]) for name in ("ratio", "ratio_cpu"))
    rows = [
        ("bare PyTorch loop", f"{ms['bare']:.1f}", "", ""),
        ("worker of Ray Train", f"{ms['trainer']:.1f}", *ratios),
    ]
    below = (
        f"MLflow, in a training of {mlflow['steps']} steps: {mlflow['calls']} calls and the sending thread's CPU "
        f"took {1e3 * mlflow['logging_s']:.0f} ms of {mlflow['training_s']:.0f} s."
    )
    if "run" in training:
        below += f" {where(training['run'])}"
    return table(("", "ms per step", "against the bare loop", "the same by CPU time"), rows, below)


def _sweep(figures: Figures) -> str:
    sweep, names = figures["sweep"], ("new", "old", "score")
    rows = [
        (side, *(f"{fmean(told[name] for told in by_seed.values()):.3f}" for name in names))
        for side, by_seed in sweep["confirmation"].items()
    ]
    rows.append(("best minus default", *(ratio(sweep["best_minus_default"][name]) for name in names)))
    trials, seeds = sweep["trials"], len(next(iter(sweep["confirmation"].values())))
    minutes = {name: f"{sweep[name] / 60:.0f}" for name in ("seconds", "seconds_before_the_kill", "prepared_s")}
    below = (
        f"Means over {seeds} fresh seeds; differences with 95 % intervals over seeds and layouts. "
        f"{trials['finished']} trials finished, {trials['stopped']} were stopped, {trials['failed']} failed; "
        f"the driver was killed after {minutes['seconds_before_the_kill']} of {minutes['seconds']} minutes, with "
        f"{sweep['ended_before_the_kill']} trials behind it. Data, base policy and artifact, made before, took "
        f"{minutes['prepared_s']} minutes."
    )
    if "run" in sweep:
        below += f" {where(sweep['run'])}"
    (best,) = (trial for trial in sweep["played"] if trial["name"] == sweep["best"])
    shares = {name: f"{share:.0%}" for name, share in sweep["importances"].items()}
    settings = [
        (f"`{name}`", f"{value:.3g}" if isinstance(value, float) else str(value), shares.get(name, ""))
        for name, value in best["values"].items()
    ]
    return table(("", *names), rows, below, table(("setting", "of the best trial", "importance"), settings))


#: The tables of benchmarks; a kind is its part's name, but for two.
PART_TABLES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "reading": _reading,
    "scale": _scale,
    "acting": _acting,
    "tuning": _tuning,
    "speed": _speed,
    "sides": _sides,
    "overhead": _overhead,
    "pictures": _pictures,
    "scaling": _scaling,
    "capacity": _capacity,
    "chaos": _chaos,
    "soak": _soak,
    "training": _training,
    "sweep": _sweep,
}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path))
    for path, text in generated().items():
        path.write_text(text)
