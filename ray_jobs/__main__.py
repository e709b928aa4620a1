"""`ipvla JOB ...`, which is `python -m ray_jobs.JOB ...`: every job by name."""

from __future__ import annotations

import runpy
import sys

from ipvla.choices import did_you_mean
from ray_jobs.command_line.index import answer, unknown
from ray_jobs.command_line.jobs import JOBS, complete, module, named, summary

_COMPLETION = "completion"


def usage() -> str:
    """What there is to run."""
    lines = [f"  {job:<14}{summary(job)}" for job in JOBS]
    return "\n".join(
        [
            "usage: ipvla JOB [--config_path FILE] [--SETTING VALUE ...]",
            "",
            *lines,
            f'  {_COMPLETION:<14}Prints the completion of bash, zsh or tcsh: eval "$(ipvla {_COMPLETION} bash)"',
            "",
            "ipvla JOB --help lists a job's settings; ipvla help WORD finds settings by name or meaning.",
            "python -m ray_jobs.JOB is the same.",
        ]
    )


def main() -> None:
    """Runs the job that the command line names, as `python -m` would."""
    name, arguments = named(sys.argv[1:] or ["--help"])
    if name == "help" and arguments:
        text, code = answer(arguments)
        print(text)
        sys.exit(code)
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == _COMPLETION:
        sys.exit(complete(arguments))
    elif name in JOBS:
        if (problem := unknown(name, arguments)) is not None:
            sys.stderr.write(f"error: {problem}\n")
            sys.exit(2)
        sys.argv = [f"ipvla {name}", *arguments]
        runpy.run_module(module(name), run_name="__main__", alter_sys=True)
    else:
        sys.stderr.write(f"error: {name}: there is no such job; {did_you_mean(name, [*JOBS, _COMPLETION])}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
