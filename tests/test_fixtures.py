"""The rule for shared test inputs: absent as a whole, a skip with a reason; one name absent, an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures import REPOSITORY, fixture_path, fixtures_root


def test_an_absent_folder_skips_with_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMC_FIXTURES", str(tmp_path / "absent"))
    with pytest.raises(pytest.skip.Exception, match=r"absent.*LLMC_FIXTURES"):
        fixture_path("models/picocode")


def test_a_misspelt_name_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("LLMC_FIXTURES", str(tmp_path))
    assert fixture_path("models") == tmp_path / "models"
    with pytest.raises(FileNotFoundError, match=r"'modles'.*models"):
        fixture_path("modles")


def test_the_default_is_beside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMC_FIXTURES", raising=False)
    assert fixtures_root() == REPOSITORY.parent / "shared" / "fixtures"
