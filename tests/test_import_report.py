"""`llmc import`: what is said of a model that is recognised whole, and of one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.import_report import report_import
from tests.importers import handwritten
from tests.importers.exports import export
from tests.test_cli import PICOCODE


def test_a_model_that_is_recognised_whole() -> None:
    report = report_import(PICOCODE)
    found = {(f.op, f.place): f.count for f in report.recognised}
    assert found["attention", "model.layers.{layer}.self_attn"] == 6
    assert found["rope", "model.layers.{layer}.self_attn"] == 12
    assert found["gated_linear", "model.layers.{layer}.mlp"] == 6
    assert {f.op for f in report.left} == {"embedding", "slice"}
    assert (report.missed, report.obstacle, report.unused_tensors) == ((), "", ())
    assert report.raised["fuse-attention"] == {"attention": 6}
    assert (report.architecture, report.num_layers, report.num_parameters, report.tensors) == ("llama", 6, 5475584, 56)


class Bare(handwritten.TriangleModel):
    """Attention without a mask."""

    def forward(self, idx: Any) -> Any:
        x = self.tokens(idx)
        y = handwritten.F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return handwritten.F.linear(self.norm(x + y), self.tokens.weight)


def test_what_is_not_recognised_and_why(tmp_path: Path) -> None:
    path = export(Bare(1).eval(), tmp_path / "model.pt2")
    report = report_import(path, dump=tmp_path / "dump")
    assert [(m.rule, m.count) for m in report.missed if m.rule == "attention"] == []
    assert "softmax" in {f.op for f in report.left}
    assert "Only attention may look at other tokens" in report.obstacle
    assert len(report.unused_tensors) == 13
    assert (tmp_path / "dump" / "summary.txt").is_file()
    assert "\nno package can be made of it: pass paged-kv" in str(report)


class NotCausal(handwritten.TriangleBlock):
    """A layer in which no token is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.triangle.fill_(1.0)


def test_the_reason_is_the_deepest_match(tmp_path: Path) -> None:
    model = handwritten.TriangleModel(2)
    model.blocks[1] = NotCausal()
    report = report_import(export(model.eval(), tmp_path / "model.pt2"))
    (missed,) = [m for m in report.missed if m.rule == "attention"]
    assert missed.reason.startswith("the scores are not masked") and "@blocks.1" in missed.node
    assert [f.count for f in report.recognised if f.op == "attention"] == [1]
