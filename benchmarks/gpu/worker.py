"""The process that measures: row after row, telling its parent which one it is at.

A kernel that fails leaves a GPU's context unusable in its process: then this one ends, and the parent starts another.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from benchmarks.gpu.measure import Lab, measure
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import Row

UNUSABLE = 3
"""Exit status after which what is left needs a new process."""
FATAL = ("illegal", "unspecified launch", "misaligned", "can do no more", "device-side assert", "CUDA_ERROR_LAUNCH")


def work(rows: Sequence[Row], results: Results, lab: Lab, deadline: float, tell: Callable[[str], None]) -> int:
    """Measure the rows for which there is time until `deadline` (by `time.monotonic`); gives the exit status.

    `tell` gets lines of JSON: `row` and `budget` before each row, `done` after it.
    """
    machine = lab.machine()
    results.check_machine(machine["gpu"])
    if "copy_bandwidth" not in results.machine:
        tell(json.dumps({"row": "", "budget": 60.0}))
        at = datetime.now(UTC).isoformat(timespec="seconds")
        results.put_machine({**machine, **lab.ceilings(), "at": at})
        tell(json.dumps({"done": "", "result": _ceilings_line(results)}))
    for row in rows:
        left = deadline - time.monotonic()
        if left < row.needs:
            tell(json.dumps({"skipped": row.name, "left": left}))
            continue
        tell(json.dumps({"row": row.name, "budget": min(row.budget, left)}))
        try:
            result = measure(row, lab, results.machine)
        except Exception as error:  # noqa: BLE001 - one row's failure must not end the others
            text = f"{type(error).__name__}: {error}"
            results.fail(row, text[:2000])
            traceback.print_exc()
            tell(json.dumps({"done": row.name, "result": f"failed: {text[:200]}"}))
            if any(word in text for word in FATAL):
                return UNUSABLE
        else:
            results.put(row.name, result)
            tell(json.dumps({"done": row.name, "result": line(result)}))
        lab.release()
    return 0


def line(result: dict[str, object]) -> str:
    """A result in a few words, for the log."""
    if "first_token" in result:
        return json.dumps(result["first_token"])
    step, peer = result["milliseconds"], result.get("peer")
    assert isinstance(step, dict)
    text = f"{step['median']:.3f} ms, {result['share']:.0%} of the bound"
    if isinstance(peer, dict):
        text += f"; {peer['name']} {peer['milliseconds']['median']:.3f} ms, {peer['ratio']['median']:.2f} times ours"
    return text


def _ceilings_line(results: Results) -> str:
    m = results.machine
    return (
        f"{m['gpu']}: copy {m['copy_bandwidth'] / 1e12:.2f} TB/s, read {m['read_bandwidth'] / 1e12:.2f} TB/s, "
        f"bf16 products {m['matrix_rate'] / 1e12:.0f} TFLOP/s"
    )
