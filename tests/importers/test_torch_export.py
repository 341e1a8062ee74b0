"""torch.export archives: logits against eager, fused ops against the descriptions, one clear error for each mistake."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.importers.choose import import_model
from llmc.importers.hf import ImportedModel
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.interpret import interpret
from llmc.ir.ops.attention import Attention
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import COMMON, step_pipeline
from tests.importers import handwritten
from tests.importers.exports import CONFIGURATIONS, Exported, export, logits_of, model_of
from tests.tiny_models import difference, save

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 60, 31)]
WRITTEN = ("eager", "sdpa", "eager-core", "sdpa-core")


def interpreted(model: ImportedModel, ids: list[int]) -> Any:
    inputs = {"token_ids": np.array(ids), "positions": np.arange(len(ids))}
    return interpret(model.graph, inputs, model.weights.load).outputs["logits"]


def fused(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes if n not in graph.parameter_only)


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_fused_ops(name: str, way: str, exported: Exported, tmp_path: Path) -> None:
    """The primitive graph gives eager's logits, and becomes the ops that the description of the family becomes."""
    if name == "gemma2" and way.startswith("sdpa"):
        way = way.replace("sdpa", "eager")  # transformers refuses it for soft caps
    model = import_model(exported(name, way))
    verify(model.graph, "primitive")
    assert parse(str(model.graph), model.graph.constants) == model.graph
    assert difference(interpreted(model, IDS), logits_of(model_of(name), IDS)) < TOLERANCE
    assert model.unused_tensors == ()
    assert model.info.num_layers == CONFIGURATIONS[name][1].get("num_hidden_layers", 2)
    assert model.info.max_sequence_length == 39
    step = step_pipeline(DType.F32).run(model.graph, observer=together(Verifier(), NumericsCheck(model.weights.load)))
    described = import_model(save(model_of(name), tmp_path / "folder"), max_sequence_length=39)
    assert fused(step) == fused(step_pipeline(DType.F32).run(described.graph))
    assert set(model.weights) <= {*described.weights, "lm_head.weight"}
    assert model.weights.num_parameters == described.weights.num_parameters
    layers = model.info.num_layers
    assert fused(step)["paged_attention"] == layers
    assert not fused(step)["softmax"] + fused(step)["mul"] + fused(step)["matmul"]


@pytest.mark.parametrize("way", ["eager", "eager-core"])
def test_capped_attention_with_windows_is_recognised(way: str, exported: Exported) -> None:
    """And norms of 1 + weight, scaled embeddings, gated products."""
    model = import_model(exported("gemma2", way))
    context = PassContext()
    graph = COMMON.run(model.graph, context, together(Verifier(), NumericsCheck(model.weights.load)))
    expected = {"rms-norm": 9, "rope": 4, "rotary-table": 1, "gated-linear": 2, "added-mask": 2, "linear": 15}
    assert {k: context.counts[k] for k in expected} == expected
    kinds = [(n.op.window, n.op.soft_cap > 0) for n in graph.nodes if isinstance(n.op, Attention)]
    assert kinds == [(8, True), (0, True)]


def test_a_package(exported: Exported, load: Callable[..., Any]) -> None:
    """Compiled for the CPU: prefill and token by token, with token ids, for want of a tokenizer."""
    for name in ("gemma2", "gpt2", "llama", "qwen3"):
        package = load(exported(name, "eager"), kv_quant="none")
        want = logits_of(model_of(name), IDS)
        assert difference(package.logits(IDS), want) < TOLERANCE
        with package.sequence() as sequence:
            rows = np.stack([sequence.step(token).logits[0] for token in IDS])
        assert difference(rows, want) < TOLERANCE
        assert package.generate(IDS[:5], max_new_tokens=1).token_ids == [int(want[4].argmax())]


@pytest.mark.parametrize("kind", [handwritten.TriangleModel, handwritten.SharedModel])
@pytest.mark.parametrize("core", [False, True])
def test_modules_written_by_hand(kind: type, core: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    judge = kind().eval()
    model = import_model(export(judge, tmp_path / "model.pt2", core))
    assert difference(interpreted(model, IDS), logits_of(judge, IDS)) < TOLERANCE
    assert model.info.max_sequence_length == 39
    step = step_pipeline(DType.F32).run(model.graph, observer=together(Verifier(), NumericsCheck(model.weights.load)))
    norms = {"layer_norm": 4, "add_layer_norm": 1} if kind is handwritten.TriangleModel else {"rms_norm": 4}
    assert {k: fused(step)[k] for k in norms} == norms
    assert fused(step)["paged_attention"] == 2
    assert fused(step)["gated_linear"] == 2 * (kind is handwritten.SharedModel)
    assert model.info.architecture == kind.__name__


def test_the_table_of_positions_bounds_the_tokens(tmp_path: Path) -> None:
    judge = handwritten.LookedUp().eval()
    model = import_model(export(judge, tmp_path / "model.pt2", longest=None))
    assert difference(interpreted(model, IDS), logits_of(judge, IDS)) < TOLERANCE
    assert model.info.max_sequence_length == handwritten.LONGEST


def test_a_mask_above_the_diagonal_that_is_added(tmp_path: Path) -> None:
    torch.manual_seed(2)
    judge = handwritten.Added().eval()
    model = import_model(export(judge, tmp_path / "model.pt2"))
    assert difference(interpreted(model, IDS), logits_of(judge, IDS)) < TOLERANCE
    assert fused(COMMON.run(model.graph))["attention"] == 1
    assert len(model.unused_tensors) == 27


def test_positions_and_a_mask_as_inputs(tmp_path: Path) -> None:
    judge = model_of("llama")
    given = {"attention_mask": torch.ones(1, 13, dtype=torch.int64), "position_ids": torch.arange(13)[None]}
    model = import_model(export(judge, tmp_path / "model.pt2", use_cache=False, **given))
    assert difference(interpreted(model, IDS), logits_of(judge, IDS)) < TOLERANCE
    assert fused(COMMON.run(model.graph))["attention"] == 2


def test_16_bit_weights(tmp_path: Path) -> None:
    """Weights stay in bf16; what is computed between them is computed in `activation`, as with descriptions."""
    model = import_model(export(model_of("llama").to(torch.bfloat16), tmp_path / "model.pt2", use_cache=False))
    wide = model_of("llama").to(torch.bfloat16).float()
    assert {s.dtype for s in model.weights.values()} == {DType.BF16}
    assert difference(interpreted(model, IDS), logits_of(wide, IDS)) < 0.01  # its frequencies too are bf16
    assert fused(COMMON.run(model.graph))["attention"] == 2


def test_positions_may_begin_anywhere(exported: Exported) -> None:
    """A sequence whose positions all are moved has the same distances: rotary logits do not change."""
    model = import_model(exported("llama", "eager"))
    inputs = {"token_ids": np.array(IDS), "positions": np.arange(len(IDS)) + 9}
    moved = interpret(model.graph, inputs, model.weights.load).outputs["logits"]
    assert difference(moved, interpreted(model, IDS)) < TOLERANCE


def test_the_longest_sequence_may_be_less(exported: Exported) -> None:
    assert import_model(exported("llama", "eager"), max_sequence_length=20).info.max_sequence_length == 20
    with pytest.raises(LlmcError, match=r"must be 1 to 39 \(the export's\), given 40"):
        import_model(exported("llama", "eager"), max_sequence_length=40)


def test_torch_is_not_imported(exported: Exported) -> None:
    code = (
        "import sys; from llmc.importers.choose import import_model; model = import_model(sys.argv[1]);"
        "model.weights.load('lm_head.weight'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, exported("llama", "eager")], check=True)


class Sorted(handwritten.TriangleModel):
    def forward(self, idx: Any) -> Any:
        return torch.sort(super().forward(idx), dim=-1)[0]


class LastOnly(handwritten.TriangleModel):
    def forward(self, idx: Any) -> Any:
        return super().forward(idx)[:, -1, :]


class Summed(handwritten.TriangleModel):
    def forward(self, idx: Any) -> Any:
        return super().forward(idx).sum(dim=1)


class Hidden(handwritten.TriangleModel):
    def forward(self, idx: Any, extra: Any = None) -> Any:
        return super().forward(idx) + extra.float()[..., None]


class Dropping(handwritten.TriangleModel):
    def forward(self, idx: Any) -> Any:
        return handwritten.F.dropout(super().forward(idx), 0.1, training=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Sorted, r"node 'sort' at no module, sort.default: this operator is not supported; did you mean"),
        (LastOnly, r"select.int: it takes one token of all: every token's logits are needed"),
        (Summed, r"sum.dim_IntList: it reduces the axes \[1\] of f32\[1, tokens, 61\]; supported: the last one"),
        (Dropping, r"dropout.default: the model was exported in training mode; call eval\(\) before"),
    ],
)
def test_what_is_not_supported_is_named(kind: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=message):
        import_model(export(kind().eval(), tmp_path / "model.pt2"))


def test_an_input_that_is_not_understood(tmp_path: Path) -> None:
    path = export(Hidden().eval(), tmp_path / "model.pt2", extra=torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(LlmcError, match=r"the input 'extra' \[1, 's\w+'\] is not understood; known: idx, position_ids"):
        import_model(path)


def test_64_bit_floats_are_refused(tmp_path: Path) -> None:
    path = export(handwritten.TriangleModel().double().eval(), tmp_path / "model.pt2")
    with pytest.raises(LlmcError, match=r"the parameter '.*' is f64; expected f32, f16 or bf16"):
        import_model(path)


def test_a_number_of_tokens_without_a_bound(tmp_path: Path) -> None:
    path = export(model_of("llama"), tmp_path / "model.pt2", longest=None, use_cache=False)
    with pytest.raises(LlmcError, match=r"the number of tokens has no upper bound; .* state --max-sequence-length"):
        import_model(path)
    assert import_model(path, max_sequence_length=500).info.max_sequence_length == 500


def test_a_fixed_number_of_tokens(tmp_path: Path) -> None:
    torch.export.save(
        torch.export.export(handwritten.TriangleModel().eval(), (torch.ones(1, 7, dtype=torch.long),)),
        tmp_path / "model.pt2",
    )
    with pytest.raises(LlmcError, match=r"idx is \[1, 7\]; expected \[1, tokens\] with a dynamic number of tokens"):
        import_model(tmp_path / "model.pt2")


def test_options_that_an_archive_does_not_take(exported: Exported) -> None:
    for option in ({"random_weights": True}, {"architecture": "mine.toml"}):
        with pytest.raises(LlmcError, match=r"is for folders and configurations; a \.pt2 holds its graph"):
            import_model(exported("llama", "eager"), **option)
