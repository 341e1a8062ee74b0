"""Products of segments of rows, each with a matrix of its own: how their units of work are shared between tasks."""

from __future__ import annotations

from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import share


@T.inline
def each_segment(starts, segments, task, tasks, units, work, where):
    """work(*where, rows, base, which, begin, count) for each segment of which the task has units: its rows base to
    base + rows are times matrix `which`, and the task has its units begin to begin + count.

    Segment s has rows starts[s] to starts[s + 1], and units(rows) units, none where it has no rows: then nothing of its
    matrix is read.
    """
    seen = T.alloc_buffer((1,), "int32", scope="local")
    seen[0] = 0
    for s in T.serial(segments):
        seen[0] = seen[0] + units(starts[s + 1] - starts[s])
    first: T.let = share(task, tasks, seen[0])
    end: T.let = share(task + 1, tasks, seen[0])
    seen[0] = 0
    for s in T.serial(segments):
        rows: T.let = starts[s + 1] - starts[s]
        here: T.let = seen[0]
        begin: T.let = T.max(first - here, 0)
        stop: T.let = T.min(end - here, units(rows))
        if begin < stop:
            work(*where, rows, starts[s], s, begin, stop - begin)
        seen[0] = here + units(rows)
