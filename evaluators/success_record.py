"""`success.json`: the results of an evaluation, with all that they depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evaluators.paired import PairedComparison
from evaluators.success_table import SuccessTable
from ipvla.files import write_text


def write_success(tables: Sequence[SuccessTable], comparisons: Sequence[PairedComparison], path: Path) -> Path:
    """Writes JSON: `policies`, a `SuccessTable.record` of each, and `comparisons`; whole or not at all."""
    record = {
        "policies": {table.policy: table.record() for table in tables},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    return write_text(path, json.dumps(record, indent=1))
