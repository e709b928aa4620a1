"""`python -m ray_jobs.data show ...`, which is `ipvla data show ...`."""

from __future__ import annotations

import sys

from ray_jobs.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data"]
    main()
