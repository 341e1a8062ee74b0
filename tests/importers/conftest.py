"""Exports that several test files read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.importers.exports import Exported, export, model_of


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(model, way)`: the archive of a tiny model, exported once."""
    folder = tmp_path_factory.mktemp("exports")

    def make(name: str, way: str = "eager") -> Path:
        path = folder / name / way / "model.pt2"
        if not path.exists():
            path.parent.mkdir(parents=True)
            attention, _, core = way.partition("-")
            export(model_of(name, attention), path, core=bool(core), use_cache=False)
        return path

    return make
