"""Generation over a fake executor with real paged memory: batches, chunks, stops, draws, streams, threads."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.arguments import split_prompts
from llmc.runtime.chat import ChatTemplate
from llmc.runtime.errors import ModelError
from llmc.runtime.plan import Limits
from llmc.runtime.tokenizer import Tokenizer, load_tokenizer
from tests.fixtures import fixture_path
from tests.runtime.fake import executor_of, free_blocks, greedy, tiny

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 1], [2] * 20, [30, 29, 28, 27], [9, 9]]


def test_greedy_is_the_argmax_without_a_cache() -> None:
    model = tiny()
    for prompt in PROMPTS:
        completion = model.generate(prompt, max_new_tokens=12)
        assert completion.token_ids == greedy(model, prompt, 12)
        assert (completion.finish_reason, completion.text, completion.seed) == ("length", "", None)
    assert free_blocks(model) == (48, 0, 48)


def test_a_batch_gets_what_each_gets_alone() -> None:
    model = tiny()
    for completion, prompt in zip(model.generate(PROMPTS, max_new_tokens=12), PROMPTS, strict=True):
        assert completion.token_ids == greedy(model, prompt, 12)
    batches = [batch.dims for _, batch in executor_of(model).batches]
    assert max(sequences for _, sequences, _, _ in batches) == 4, "sequences decode together"
    assert max(tokens for tokens, _, _, _ in batches) == 16, "prompts share a prefill step"
    assert free_blocks(model) == (48, 0, 48)


def test_unequal_lengths_leave_one_by_one() -> None:
    model = tiny(context=12)
    completions = model.generate([[1] * n for n in (11, 10, 8, 1)], max_new_tokens=64)
    assert [len(c.token_ids) for c in completions] == [2, 3, 5, 12], "the last token is not read"
    assert {c.finish_reason for c in completions} == {"length"}
    decoding = [b.dims[1] for entry, b in executor_of(model).batches if entry == "decode"]
    assert decoding == sorted(decoding, reverse=True) and decoding[-1] == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=30), min_size=1, max_size=7),
    st.integers(1, 20),
    st.integers(12, 60),
    st.floats(0.0, 2.0),
    st.sampled_from([Limits(16, 4, 4), Limits(3, 2, 2), Limits(64, 8, 3), Limits(5, 1, 1)]),
)
def test_nothing_depends_on_the_batch(
    prompts: list[list[int]], count: int, blocks: int, temperature: float, limits: Limits
) -> None:
    """Little memory, small chunks, any limits: the same tokens as one prompt at a time in a large machine."""
    options: dict[str, Any] = {"max_new_tokens": count, "temperature": temperature, "seed": 7}
    small = tiny(context=48, num_blocks=blocks, limits=limits)
    large = tiny(context=48)
    found = small.generate(prompts, **options)
    for i, prompt in enumerate(prompts):
        if prompt not in prompts[:i]:
            assert found[i].token_ids == large.generate(prompt, **options).token_ids
    assert free_blocks(small) == (blocks, 0, blocks)


def test_copies_of_a_prompt_get_different_draws() -> None:
    model = tiny()
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.5, "seed": 3}
    outs = model.generate([[1, 2]] * 5, **options)
    assert len({tuple(out.token_ids) for out in outs}) == 5
    assert outs[0].token_ids == model.generate([1, 2], **options).token_ids
    assert [o.token_ids for o in outs] == [o.token_ids for o in model.generate([[1, 2]] * 5, **options)]


def test_a_seed_that_was_not_given_is_reported_and_repeats() -> None:
    model = tiny()
    first = model.generate([1, 2], max_new_tokens=20, temperature=1.5)
    assert first.seed is not None
    assert model.generate([1, 2], max_new_tokens=20, temperature=1.5, seed=first.seed).token_ids == first.token_ids
    assert model.generate([1, 2], max_new_tokens=20, temperature=1.5).token_ids != first.token_ids


def test_sampling_follows_the_logits() -> None:
    """One token after the same prompt, 3000 seeds: chi-square against the softmax; top_k=1 is greedy."""
    model = tiny(vocab_size=8)
    logits = executor_of(model).model.logits([1, 2])[-1].astype(np.float64) / 3.0
    shares = np.exp(logits - logits.max())
    expected = 3000 * shares / shares.sum()
    drawn = [model.generate([1, 2], 1, temperature=3.0, seed=s).token_ids[0] for s in range(3000)]
    counts = np.bincount(drawn, minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # the 99.9 % quantile, 7 degrees of freedom
    assert model.generate([1, 2], 9, temperature=3.0, top_k=1).token_ids == greedy(model, [1, 2], 9)


def test_the_penalty_counts_prompt_and_completion() -> None:
    model = tiny()
    ids = [1, 2]
    for _ in range(15):
        logits = executor_of(model).model.logits(ids)[-1].copy()
        seen = sorted(set(ids))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / np.float32(1.7), logits[seen] * np.float32(1.7))
        ids.append(int(logits.argmax()))
    assert model.generate([1, 2], 15, repetition_penalty=1.7).token_ids == ids[2:]


def test_end_tokens_and_stop_tokens() -> None:
    plain = tiny()
    whole = plain.generate([1, 2, 3], 20).token_ids
    end = whole[4]
    first = whole.index(end)
    model = tiny(eos=(end, 0))
    stopped = model.generate([1, 2, 3], 20)
    assert (stopped.token_ids, stopped.finish_reason) == (whole[: first + 1], "stop")
    assert model.generate([1, 2, 3], 20, ignore_eos=True).token_ids == whole
    for stop in (end, [end], (np.int64(end),)):
        by_id = plain.generate([1, 2, 3], 20, stop=stop)
        assert (by_id.token_ids, by_id.finish_reason) == (whole[: first + 1], "stop")
    assert free_blocks(model)[0] == free_blocks(model)[2]


def test_the_context_bounds_a_completion() -> None:
    model = tiny(context=10)
    full = model.generate(list(range(10)), 5)
    assert (full.token_ids, full.finish_reason) == (greedy(model, list(range(10)), 1), "length")
    assert [p.token_id for p in model.stream(list(range(10)), 5)] == full.token_ids
    assert model.generate(list(range(9)), 5).token_ids == greedy(model, list(range(9)), 2)
    mixed = model.generate([list(range(10)), [1]], 3)
    assert [len(c.token_ids) for c in mixed] == [1, 3]
    with pytest.raises(ValueError, match="given 11 tokens, expected at most 10"):
        model.generate(list(range(11)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(fixture_path("models/stories260K/hf/tokenizer.json"), 1, True)


def test_text_in_text_out(tokenizer: Tokenizer) -> None:
    model = tiny(vocab_size=512, tokenizer=tokenizer)
    out = model.generate("Once upon a time", 20)
    prompt = tokenizer.encode("Once upon a time")
    assert out.token_ids == greedy(model, prompt, 20)
    assert str(out) == out.text == tokenizer.decode(prompt + out.token_ids)[len("Once upon a time") :]
    assert model.generate(prompt, 20).text == out.text
    assert out.prompt_token_ids == prompt
    assert len(model.generate("", 3).token_ids) == 3, "an empty text is the beginning token"


def test_a_conversation_goes_through_the_template(tokenizer: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = tiny(vocab_size=512, context=64, tokenizer=tokenizer, template=ChatTemplate(source, {"bos_token": "<s>"}))
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.encode("<s>[user] hi[assistant]", add_special_tokens=False)
    assert prompt[0] == 1 and prompt.count(1) == 1, "the template's own beginning token is the only one"
    assert model.chat_prompt(messages) == prompt
    assert model.chat(messages, max_new_tokens=9).token_ids == greedy(model, prompt, 9)
    without = tokenizer.encode("<s>[user] hi", add_special_tokens=False)
    assert model.chat_prompt(messages, add_generation_prompt=False) == without
    with pytest.raises(ValueError, match="add_generation_prompt: given 'no'"):
        model.chat(messages, add_generation_prompt="no")  # type: ignore[arg-type]


def test_a_stream_is_the_completion_in_pieces(tokenizer: Tokenizer) -> None:
    model = tiny(vocab_size=512, tokenizer=tokenizer)
    for options in ({}, {"temperature": 1.2, "seed": 4}, {"stop": ["a", "th", "e "]}, {"temperature": 2.0, "seed": 1}):
        out = model.generate("One day", 30, **options)
        pieces = list(model.stream("One day", 30, **options))
        assert "".join(pieces) == out.text
        assert [p.token_id for p in pieces] == out.token_ids
        assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + [out.finish_reason]
    assert free_blocks(model)[0] == free_blocks(model)[2]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), start=st.integers(0, 40), length=st.integers(1, 5))
def test_a_stop_string_cuts_the_text(tokenizer: Tokenizer, seed: int, start: int, length: int) -> None:
    """Any part of what would have come, as a stop string: the text ends before its first occurrence."""
    model = tiny(vocab_size=512, tokenizer=tokenizer)
    whole = model.generate("One day", 24, temperature=1.5, seed=seed)
    stop = whole.text[start : start + length]
    if stop:
        cut = model.generate("One day", 24, temperature=1.5, seed=seed, stop=stop)
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert stop in model.tokenizer.decode(cut.prompt_token_ids + cut.token_ids)


def test_streams_and_calls_interleave() -> None:
    model = tiny()
    first, second = model.stream([1, 2, 3], 12), model.stream([7, 8], 12)
    tokens: tuple[list[int], list[int]] = ([], [])
    for a, b in zip(first, second, strict=True):
        tokens[0].append(a.token_id)
        tokens[1].append(b.token_id)
        assert model.generate([5], 2).token_ids == greedy(model, [5], 2)
    assert list(tokens) == [greedy(model, [1, 2, 3], 12), greedy(model, [7, 8], 12)]


def test_a_stream_that_is_closed_or_dropped_gives_its_blocks_back() -> None:
    model = tiny()
    stream = model.stream([1, 2, 3], 12)
    next(stream)
    assert free_blocks(model)[0] < 48
    stream.close()  # type: ignore[attr-defined]
    assert free_blocks(model) == (48, 0, 48)
    stream = model.stream([1, 2, 3], 12)
    next(stream)
    del stream
    gc.collect()
    assert free_blocks(model) == (48, 0, 48)


def test_options_of_a_stream_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="temperature: given -1"):
        tiny().stream([1], temperature=-1)
    with pytest.raises(ValueError, match="given a list of 2 prompts, expected one"):
        tiny().stream([[1], [2]])


def test_memory_that_others_hold() -> None:
    """Streams hold blocks; what no longer fits says so, and works when there is room again."""
    model = tiny(context=16, num_blocks=6)
    streams = [model.stream([1, 2, 3, 4, 5], 4) for _ in range(3)]
    for stream in streams:
        next(stream)
    with pytest.raises(ModelError, match="memory is full: 0 of 6 blocks are free"):
        model.generate([1, 2, 3, 4, 5], 4)
    streams.pop().close()  # type: ignore[attr-defined]
    assert model.generate([1, 2, 3, 4, 5], 4).token_ids == greedy(model, [1, 2, 3, 4, 5], 4)


def test_threads_share_a_model() -> None:
    model = tiny()
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = model.generate(PROMPTS[i : i + 3], 10)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert [c.token_ids for c in found[i]] == [greedy(model, p, 10) for p in PROMPTS[i : i + 3]]
    assert free_blocks(model) == (48, 0, 48)


def test_timings_count_what_was_computed() -> None:
    timings = tiny().generate([[1, 2, 3], [4, 5]], 5)[0].timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (5, 8)
    assert timings.prefill_tokens_per_second > 0 and timings.decode_tokens_per_second > 0


def test_a_closed_model_says_so() -> None:
    model = tiny()
    stream = model.stream([1, 2], 9)
    next(stream)
    with model:
        pass
    model.close()
    for use in (lambda: model.generate([1]), lambda: next(stream), lambda: model.logits([1]), model.sequence):
        with pytest.raises(ModelError, match="closed"):
            use()


def test_prompts_of_every_kind() -> None:
    assert split_prompts("a") == (["a"], True)
    assert split_prompts([1, 2]) == ([[1, 2]], True)
    assert split_prompts(np.array([1, 2])) == ([[1, 2]], True)
    assert split_prompts(["a"]) == (["a"], False)
    assert split_prompts([[1], (2, 3)]) == ([[1], (2, 3)], False)
    assert split_prompts([np.array([4])]) == ([[4]], False)
