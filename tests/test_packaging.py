"""The sdist and the wheel hold one name, llmc, and every source file; built from a copy as a fresh clone would be."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import llmc
from tests.fixtures import REPOSITORY
from tests.sources import import_path, repository_files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel built from that sdist."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in repository_files():
        if name.startswith("examples/"):
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name, follow_symlinks=False)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the build failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return copy / "dist"


def wheel_files(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"llmc-{llmc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files() -> set[str]:
    """Every file under llmc and the linked folders, as imports see it; the links themselves are no files."""
    return {
        path
        for name in repository_files()
        if not (REPOSITORY / name).is_symlink() and (path := import_path(name)) is not None
    }


def test_the_wheel_has_one_name(built: Path) -> None:
    tops = {name.split("/")[0] for name in wheel_files(built)}
    assert tops == {"llmc", f"llmc-{llmc.__version__}.dist-info"}


def test_the_wheel_has_every_source_file(built: Path) -> None:
    expected, files = source_files(), wheel_files(built)
    assert {"llmc/ir/op.py", "llmc/__init__.py", "llmc/templates/__init__.py"} <= expected
    missing = expected - files
    assert not missing, f"not in the wheel: {sorted(missing)}; an __init__.py is missing, or a line of package-data"
    surplus = {name for name in files if name.startswith("llmc/")} - expected
    assert not surplus, f"in the wheel, not in the repository: {sorted(surplus)}"


def test_the_sdist_has_every_source_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    missing = source_files() - members.keys()
    assert not missing, f"not in the sdist: {sorted(missing)}"
    assert all(m.isfile() or m.isdir() for m in members.values()), "a link in the sdist would dangle"
    assert {"LICENSE", "pyproject.toml"} <= members.keys()


def test_the_linked_folders_are_links() -> None:
    for name in ("ir", "passes", "backends", "templates"):
        link = REPOSITORY / "llmc" / name
        assert link.is_symlink(), f"llmc/{name} is a copy: two modules would have one source each"
        assert link.readlink() == Path("..") / name
