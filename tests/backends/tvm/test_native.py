"""The C runtime: the pool's threads, the order of a step, fork, quotas."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.backends.tvm.compile import COMPILE_FLAGS, NATIVE, link, native_sources
from llmc.backends.tvm.isa import ISAS
from tests.backends.tvm.machine import Array, needs_v3
from tests.fixtures import REPOSITORY

pytestmark = needs_v3
HERE = Path(__file__).parent
KERNELS = ("increment", "reverse", "many", "count", "subnormal", "slow")
HELPERS = ("flush_subnormals", "keep_subnormals", "float_state")
LAUNCH = np.dtype([("kernel", "<i4"), ("arg_count", "<i4"), ("first_arg", "<i4"), ("flags", "<i4")])
BARRIER, EACH = 1, 2


def build(path: Path) -> None:
    """A library of the test's own kernels and the C runtime."""
    code = path.with_suffix(".o")
    subprocess.run(["gcc", "-O1", "-fPIC", "-c", str(HERE / "native_kernels.c"), "-o", str(code)], check=True)
    # One object holds them all; the other names only have to be exported.
    empty = path.with_suffix(".empty.o")
    subprocess.run(["gcc", "-c", "-x", "c", "/dev/null", "-o", str(empty)], check=True)
    link(
        {"increment": code.read_bytes(), **{k: empty.read_bytes() for k in (*KERNELS[1:], *HELPERS)}},
        ISAS["x86-64-v3"],
        path,
    )


class Native:
    """The library by ctypes; steps over one pool."""

    def __init__(self, path: Path, threads: int) -> None:
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        self.library.llmc_pool_create.restype = ctypes.c_void_p
        self.library.llmc_build.restype = ctypes.c_char_p
        self.library.llmc_read_bandwidth.restype = ctypes.c_double
        self.pool = ctypes.c_void_p(self.library.llmc_pool_create(threads))
        addresses = [ctypes.cast(self.library[k], ctypes.c_void_p).value for k in KERNELS]
        self.kernels = np.array(addresses, np.uint64)

    @property
    def threads(self) -> int:
        return int(self.library.llmc_pool_threads(self.pool))

    def step(
        self,
        launches: list[tuple[str, list[Array | list[Array]], int]],
        dims: list[int],
        times: Array | None = None,
        each_tokens: int = 0,
    ) -> int:
        """Runs (kernel, arrays, flags) in order; a list of arrays is one for each task. The status."""
        records = np.zeros(len(launches), LAUNCH)
        args: list[list[int]] = []
        for record, (kernel, arrays, flags) in zip(records, launches, strict=True):
            record["kernel"], record["arg_count"] = KERNELS.index(kernel), len(arrays)
            record["first_arg"], record["flags"] = len(args), flags
            each_task = [a if isinstance(a, list) else [a] * self.threads for a in arrays]
            args += [[b.ctypes.data for b in tasks] for tasks in each_task]
        pointers = np.ascontiguousarray(np.array([*args, [0] * self.threads], np.uint64).T)
        sizes = np.array(dims, np.int32)
        p: Any = [ctypes.c_void_p(a.ctypes.data) for a in (records, self.kernels, pointers, sizes)]
        nanoseconds = None if times is None else ctypes.c_void_p(times.ctypes.data)
        stride = pointers.shape[1]
        return int(
            self.library.llmc_step(self.pool, p[0], len(launches), p[1], p[2], stride, each_tokens, p[3], nanoseconds)
        )

    def close(self) -> None:
        self.library.llmc_pool_destroy(self.pool)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "kernels.so"
    build(path)
    return path


@pytest.fixture(params=[1, 2, 3, 9])
def native(path: Path, request: pytest.FixtureRequest) -> Iterator[Native]:
    library = Native(path, request.param)
    assert library.threads == request.param
    yield library
    library.close()


def check_order(native: Native, layers: int = 60, n: int = 501) -> None:
    """Alternating kernels, each reading what all tasks of the one before wrote."""
    a, b = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    launches: Any = [("increment", [a, b], BARRIER), ("reverse", [a, b], BARRIER)] * layers
    assert native.step(launches, [n]) == 0
    expected = np.arange(n, dtype=np.int32)[:: 1 if layers % 2 == 0 else -1] + layers
    assert (a == expected).all()


def test_a_barrier_is_between_launches(native: Native) -> None:
    for layers in (1, 60, 61):
        check_order(native, layers)
    time.sleep(0.01)  # the threads are asleep now
    check_order(native)


def test_kernels_take_up_to_24_pointers(native: Native) -> None:
    arrays: Any = [np.full(2, -1, np.int32) for _ in range(24)]
    assert native.step([("many", arrays, BARRIER)], [0]) == 0
    assert [a.tolist() for a in arrays] == [[i, native.threads] for i in range(24)]


def test_too_many_pointers_are_refused_before_anything_runs(native: Native) -> None:
    a, b = np.zeros(3, np.int32), np.zeros(3, np.int32)
    assert native.step([("increment", [a, b], BARRIER), ("many", [a] * 25, BARRIER)], [3]) == 1
    assert (b == 0).all()
    assert native.step([], [0]) == 0


def test_launches_are_timed_with_their_barriers(native: Native) -> None:
    a, b = np.zeros(3, np.int32), np.zeros(3, np.int32)
    times = np.zeros(3, np.uint64)
    start = time.perf_counter_ns()
    native.step([("increment", [a, b], BARRIER), ("slow", [], BARRIER), ("reverse", [a, b], BARRIER)], [3], times)
    elapsed = time.perf_counter_ns() - start
    # A task may begin a launch before the caller, who looks at the clock, has woken from the barrier before it.
    assert times[0] + times[1] >= 20_000_000 and times.sum() <= elapsed
    native.step([("increment", [a, b], BARRIER), ("reverse", [a, b], BARRIER), ("slow", [], 0)], [3], times)
    assert times.sum() >= 20_000_000, "the last launch waits for all tasks"


def private(native: Native, n: int) -> list[Array]:
    """A buffer for each task."""
    return [np.full(n, -1, np.int32) for _ in range(native.threads)]


@pytest.mark.parametrize("layers", [1, 40, 41])
@pytest.mark.parametrize(("tokens", "limit"), [(5, 8), (8, 8), (1, 1)])
def test_every_task_runs_an_each_launch_for_itself(native: Native, tokens: int, limit: int, layers: int) -> None:
    """Alternating: each task fills its own buffer, then all share a launch that reads its own task's.

    A new pool's first step has all threads; in later ones the caller may work alone, and then it uses the first buffer.
    """
    a, c, p = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32), private(native, tokens)
    counts = private(native, 2)
    layer: Any = [("increment", [a, p], BARRIER | EACH), ("count", [counts], BARRIER | EACH)]
    layer += [("reverse", [c, p], BARRIER), ("increment", [c, p], EACH), ("reverse", [a, p], BARRIER)]
    assert native.step(layer * layers, [tokens], each_tokens=limit) == 0
    assert (a == np.arange(tokens) + 2 * layers).all()
    assert all((b == a[::-1]).all() for b in p), "every task has all rows"
    assert [b.tolist() for b in counts] == [[0, 1]] * native.threads, "as the one task of one"


@pytest.mark.parametrize(("tokens", "limit"), [(9, 8), (1, 0), (501, 8)])
def test_longer_steps_share_each_launches(native: Native, tokens: int, limit: int) -> None:
    a, c, p = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32), private(native, tokens)
    layer: Any = [("increment", [a, p], BARRIER | EACH), ("reverse", [c, p], BARRIER)]
    layer += [("increment", [c, p], BARRIER | EACH), ("reverse", [a, p], BARRIER)]
    assert native.step(layer * 30, [tokens], each_tokens=limit) == 0
    assert (a == np.arange(tokens) + 60).all() and (p[0] == a[::-1]).all()
    assert all((b == -1).all() for b in p[1:]), "all tasks use the first one's buffer"


def test_each_launches_are_timed_without_a_barrier(path: Path) -> None:
    """The caller waits for a slow task not after an each launch, but after the next one that all share."""
    native = Native(path, 2)
    a, b, p = np.zeros(3, np.int32), np.zeros(3, np.int32), private(native, 3)
    times = np.zeros(3, np.uint64)
    launches: Any = [("slow", [], 0), ("increment", [a, p], BARRIER | EACH), ("reverse", [b, p], BARRIER)]
    start = time.perf_counter_ns()
    native.step(launches, [3], times, each_tokens=8)
    elapsed = time.perf_counter_ns() - start
    assert times[1] < times[2] and 20_000_000 <= times.sum() <= elapsed
    # Run for itself, every task is the last one, which is the one that `slow` keeps.
    native.step([("slow", [], BARRIER | EACH), *launches[1:]], [3], times, each_tokens=8)
    assert times[0] >= 20_000_000
    native.close()


def test_concurrent_steps_of_one_pool_take_turns(native: Native) -> None:
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            for _ in range(20):
                check_order(native)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pools_and_copies_of_the_library_do_not_meet(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    copy.write_bytes(path.read_bytes())
    libraries = [Native(path, 2), Native(path, 3), Native(copy, 2)]
    for _ in range(5):
        for library in libraries:
            check_order(library)
    libraries[0].close()
    check_order(libraries[1])
    check_order(libraries[2])
    for library in libraries[1:]:
        library.close()


def test_subnormals_are_kept_whatever_the_caller_does(native: Native) -> None:
    tiny, out = np.array([np.finfo(np.float32).tiny], np.float32), np.zeros(9, np.float32)
    native.library.flush_subnormals()
    try:
        before = native.library.float_state()
        native.step([("subnormal", [tiny, out], BARRIER)], [0])
        assert native.library.float_state() == before, "the caller's own state is put back"
    finally:
        native.library.keep_subnormals()
    assert (out.view(np.uint32)[: native.threads] == 0x00400000).all()


def test_idle_threads_sleep(path: Path) -> None:
    native = Native(path, 2)
    check_order(native)
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
    native.close()


@pytest.mark.parametrize("bytes_", [0, 1, 4095, 4096, 4097, 1_000_003])
def test_copy(native: Native, bytes_: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, bytes_, dtype=np.uint8)
    destination = np.zeros(bytes_ + 1, np.uint8)
    native.library.llmc_copy(
        native.pool, *(ctypes.c_void_p(a.ctypes.data) for a in (destination, source)), ctypes.c_uint64(bytes_)
    )
    assert (destination[:-1] == source).all() and destination[-1] == 0


def test_read_bandwidth_and_build(native: Native) -> None:
    data = np.ones(1 << 22, np.uint8)
    speed = native.library.llmc_read_bandwidth(
        native.pool, ctypes.c_void_p(data.ctypes.data), ctypes.c_uint64(data.size)
    )
    assert 1e7 < speed < 1e13
    assert native.library.llmc_build() == b"llmc-native 2 x86-64-v3"


FORK = """
import os, sys
from pathlib import Path
from tests.backends.tvm.test_native import Native, check_order
native = Native(Path(sys.argv[1]), 3)
check_order(native)
for _ in range(10):
    child = os.fork()
    if child == 0:
        check_order(native)
        grandchild = os.fork()
        if grandchild == 0:
            check_order(native)
            native.close()
            os._exit(0)
        check_order(native)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    check_order(native)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
native.close()
print("done")
"""


def run_python(code: str, *arguments: str) -> str:
    # Python 3.12 warns of any fork with threads; that one works is what is tested here.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_pool_works_after_fork(path: Path) -> None:
    assert run_python(FORK, str(path)) == "done"


def test_threads_follow_the_affinity(path: Path) -> None:
    code = "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from pathlib import Path\n"
    code += "from tests.backends.tvm.test_native import Native; n = Native(Path(sys.argv[1]), 0)\n"
    assert run_python(code + "print(n.threads)", str(path)) == "1"


def available(path: Path, root: Path) -> int:
    return int(ctypes.CDLL(str(path)).llmc_available_threads(str(root).encode()))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_threads_follow_the_quota(path: Path, tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("needs two processors")
    groups = tmp_path / "sys/fs/cgroup"
    assert available(path, tmp_path) == cpus, "no cgroup at all"
    write(tmp_path / "proc/self/cgroup", "0::/a/b")
    assert available(path, tmp_path) == cpus
    write(groups / "a/b/cpu.max", "max 100000")
    assert available(path, tmp_path) == cpus
    write(groups / "a/cpu.max", "150000 100000")
    assert available(path, tmp_path) == 1, "a group above binds too; a part of a processor carries no thread"
    write(groups / "a/cpu.max", "200000 100000")
    assert available(path, tmp_path) == 2
    write(groups / "a/b/cpu.max", "5000 100000")
    assert available(path, tmp_path) == 1, "at least one"


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_threads_follow_the_quota_of_version_1(path: Path, tmp_path: Path, mount: str) -> None:
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("needs two processors")
    write(tmp_path / "proc/self/cgroup", "7:cpuset:/x\n4:cpu,cpuacct:/docker/abc")
    write(tmp_path / f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us", "100000")
    write(tmp_path / f"sys/fs/cgroup/{mount}/cpu.cfs_period_us", "100000")
    assert available(path, tmp_path) == 1
    write(tmp_path / f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us", "-1")
    assert available(path, tmp_path) == cpus


def test_threads_of_one_core_count_once(path: Path, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    for cpu in cpus[:2]:
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpus[0]},{cpus[1]}")
    assert available(path, tmp_path) == len(cpus) - 1


def test_no_data_race(tmp_path: Path) -> None:
    """The thread sanitizer finds none."""
    program = tmp_path / "race"
    flags = [f for f in COMPILE_FLAGS if not f.startswith("-fvisibility")]
    sources = [str(s) for s in (*native_sources(), HERE / "native_race.c")]
    made = subprocess.run(
        ["gcc", *flags, "-g", "-fsanitize=thread", '-DLLMC_ISA="tsan"', f"-I{NATIVE}", *sources, "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "tsan" in made.stderr and "cannot find" in made.stderr:
        pytest.skip("the thread sanitizer's library is not installed")
    assert made.returncode == 0, made.stderr
    # Some kernels place memory where the sanitizer does not expect it unless addresses are not randomised.
    done = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in done.stderr or "setarch" in done.stderr:
        pytest.skip(f"the thread sanitizer does not run here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr[:3000]
