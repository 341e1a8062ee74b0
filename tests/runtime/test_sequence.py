"""A sequence by hand: chunks, forks, roll-backs; and what is built on it: logits, perplexity, the stored checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.document import Field
from llmc.runtime.errors import ModelError
from llmc.runtime.model import Model
from llmc.runtime.plan import Limits
from llmc.runtime.sequence import Sequence, split_chunks
from tests.runtime.fake import executor_of, free_blocks, tiny


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(1, 20),
    st.integers(1, 6),
    st.data(),
)
def test_chunks_cover_the_tokens(ids: list[int], tokens: int, outputs: int, data: st.DataObject) -> None:
    limits = Limits(max(tokens, 2), 2, outputs)
    model = tiny(limits=limits)
    wanted = data.draw(st.integers(0, len(ids)))
    parts = list(split_chunks(model._engine, np.array(ids, np.int32), wanted))
    assert [t for part, _ in parts for t in part.tolist()] == ids
    assert sum(count for _, count in parts) == wanted
    assert all(0 < len(part) <= limits.tokens and count <= min(outputs, len(part)) for part, count in parts)
    reference = executor_of(model).model.logits(ids)
    with model.sequence() as sequence:
        output = sequence.prefill(ids, wanted)
        np.testing.assert_array_equal(output.logits, reference[len(ids) - wanted :])
        np.testing.assert_array_equal(output.greedy, reference[len(ids) - wanted :].argmax(1))


def test_one_step_for_a_prompt_that_fits() -> None:
    model = tiny()
    with model.sequence() as sequence:
        sequence.prefill(list(range(16)))
    assert [(entry, batch.dims) for entry, batch in executor_of(model).batches] == [("prefill", (16, 1, 4, 1))]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_forks_and_rollbacks(data: st.DataObject) -> None:
    """Sequences that share blocks go their own ways; each always computes what its tokens alone would give."""
    model = tiny(num_blocks=30)
    reference = executor_of(model).model
    live = [model.sequence()]
    for _ in range(data.draw(st.integers(1, 14))):
        sequence = data.draw(st.sampled_from(live))
        action = data.draw(st.sampled_from(["grow", "grow", "fork", "truncate", "free"]))
        if action == "grow":
            tokens = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=7))
            if sequence.length + len(tokens) > 48:
                continue
            try:
                output = sequence.prefill(tokens)
            except ModelError:
                assert free_blocks(model)[0] < 3
                continue
            np.testing.assert_array_equal(output.logits[0], reference.logits(sequence.token_ids)[-1])
        elif action == "fork" and len(live) < 5:
            live.append(sequence.fork())
            assert live[-1].token_ids == sequence.token_ids
        elif action == "truncate":
            sequence.truncate(data.draw(st.integers(0, sequence.length)))
        elif action == "free" and len(live) > 1:
            live.remove(sequence)
            sequence.free()
    for sequence in live:
        sequence.free()
        sequence.free()
    assert free_blocks(model) == (30, 0, 30)


def test_a_fork_costs_nothing_until_it_is_written() -> None:
    model = tiny()
    with model.sequence() as sequence:
        sequence.prefill(list(range(10)))
        free = free_blocks(model)[0]
        forks = [sequence.fork() for _ in range(8)]
        assert free_blocks(model)[0] == free
        forks[0].step(1)
        assert free_blocks(model)[0] == free - 1, "the block that both would write is copied"
        for fork in forks:
            fork.free()


def test_sequences_that_are_dropped_come_back_when_memory_is_short() -> None:
    model = tiny(num_blocks=4)
    for _ in range(5):
        model.sequence().prefill([1, 2, 3, 4, 5])
    assert len(model.generate([1] * 10, 4).token_ids) == 4


def test_mistakes_with_a_sequence() -> None:
    model = tiny(context=8, num_blocks=4)
    sequence = model.sequence()
    sequence.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="3 tokens and 6 more do not fit: expected at most 8"):
        sequence.prefill([1] * 6)
    with pytest.raises(ValueError, match="given 31"):
        sequence.step(31)
    with pytest.raises(ValueError, match="outputs: given 3, expected 0 to 2"):
        sequence.prefill([1, 2], outputs=3)
    for length in (-1, 4, True):
        with pytest.raises(ValueError, match=f"length: given {length}, expected 0 to 3"):
            sequence.truncate(length)
    other = model.sequence()
    other.prefill([1] * 8)
    full = model.sequence()
    full.prefill([1] * 4)
    with pytest.raises(ModelError, match="memory is full"):
        full.prefill([1] * 4)
    assert (sequence.token_ids, full.token_ids) == ([1, 2, 3], [1] * 4)
    sequence.free()
    with pytest.raises(ModelError, match="was freed"):
        sequence.step(1)
    with pytest.raises(ModelError, match="was freed"):
        sequence.fork()
    assert isinstance(full, Sequence)


def test_logits_are_all_rows() -> None:
    model = tiny()
    ids = np.random.default_rng(0).integers(0, 31, 48)
    logits = model.logits(ids)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, executor_of(model).model.logits(ids.tolist()))
    assert free_blocks(model) == (48, 0, 48)


@pytest.mark.parametrize("context", [1, 5, 16, 48])
@pytest.mark.parametrize("count", [2, 17, 33, 120])
def test_perplexity_by_its_definition(context: int, count: int) -> None:
    model = tiny()
    ids = np.random.default_rng(1).integers(0, 31, count).tolist()
    losses = []
    for start in range(0, count - 1, context):
        window = ids[start : start + context + 1]
        logits = executor_of(model).model.logits(window[:-1]).astype(np.float64)
        losses += (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(window) - 1), window[1:]]).tolist()
    assert len(losses) == count - 1
    assert model.perplexity(ids, context) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)


def checks(model: Model, **changes: Any) -> dict[str, Any]:
    """What a compile would have stored for two prompts."""
    cases = []
    for ids in ([1, 2, 3], [5] * 20):
        row, continuation = executor_of(model).model.logits(ids)[-1].astype(float), list(ids)
        for _ in range(4):
            continuation.append(int(executor_of(model).model.logits(continuation)[-1].argmax()))
        top = [[int(t), float(row[t])] for t in np.argsort(-row)[:8]]
        greedy = continuation[len(ids) :]
        cases.append({"token_ids": ids, "top": top, "greedy": greedy, "max_abs": float(np.abs(row).max()), **changes})
    return {"cases": cases, "tolerance": 1e-4, "reference": "a test"}


def verified(document: dict[str, Any]) -> Any:
    return tiny(checks=Field(document, "checks.json")).verify()


def test_verify_finds_what_differs() -> None:
    stored = checks(tiny())
    report = verified(stored)
    assert report.ok and report.difference < 1e-6 and report.top1_agreement == 1.0
    assert str(report).splitlines()[-1] == "ok: 2 of 2 cases" and "greedy 4/4" in str(report)

    for alter in (other_logit, other_token, other_continuation):
        stored = checks(tiny())
        alter(stored["cases"][0])
        report = verified(stored)
        assert not report.ok and [case.ok for case in report.cases] == [False, True]
        assert "DIFFERS: 1 of 2 cases" in str(report)


def other_logit(case: dict[str, Any]) -> None:
    case["top"][0][1] += 0.01 * case["max_abs"]


def other_token(case: dict[str, Any]) -> None:
    case["top"][0][0] = next(t for t in range(31) if t not in [token for token, _ in case["top"]])


def other_continuation(case: dict[str, Any]) -> None:
    case["greedy"][2] = (case["greedy"][2] + 1) % 31


def test_verify_without_a_continuation() -> None:
    report = verified(checks(tiny(), greedy=None))
    assert report.ok and report.cases[0].continuation == 0


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": []},
        {"token_ids": [31]},
        {"token_ids": [1] * 49},
        {"top": []},
        {"top": [[1]]},
        {"top": [[1, 0], [2, 1]]},
        {"max_abs": "x"},
    ],
)
def test_checks_that_are_damaged(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"checks\.json"):
        verified(checks(tiny(), **change))


def test_a_package_without_checks_or_tokenizer_or_template() -> None:
    model = tiny()
    with pytest.raises(ModelError, match=r"no checks\.json"):
        model.verify()
    with pytest.raises(ModelError, match="no tokenizer"):
        _ = model.tokenizer
    with pytest.raises(ModelError, match="no chat template"):
        model.chat([{"role": "user", "content": "hi"}])
