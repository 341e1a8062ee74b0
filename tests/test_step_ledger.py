"""The ledger of a decode step: launches of one kind together, of all layers, for one step."""

from __future__ import annotations

from llmc.runtime.timings import ProfileRow
from llmc.step_ledger import LedgerRow, StepLedger, group_rows


def test_layers_are_put_together() -> None:
    rows = [ProfileRow("decode", f"model.layers.{i}.mlp:linear", "linear_1", 4, 0.4, 80, 400 + 4 * i) for i in range(3)]
    rows.append(ProfileRow("decode", "lm_head:linear", "linear_2", 4, 4.0, 8, 40))
    assert group_rows(rows) == (
        LedgerRow("lm_head:linear", ("linear_2",), 1, 10, 1.0),
        LedgerRow("model.layers.*.mlp:linear", ("linear_1",), 3, 303, 0.1 * 3),
    )


def test_it_says_how_much_of_the_step_it_explains() -> None:
    rows = (LedgerRow("a:x", ("k",), 2, 6_000_000, 3e-3), LedgerRow("b:y", ("l",), 1, 1_000_000, 1e-3))
    ledger = StepLedger("p", 2, 1, 512, 5e-3, 6e-3, 4e9, rows)
    assert ledger.sum_seconds == 4e-3 and ledger.coverage == 0.8
    assert ledger.as_json()["rows"][0]["share_of_bandwidth"] == 0.5
    text = str(ledger)
    assert "sum is 80.0% of it" in text and "a:x" in text
