"""Every mistake of a caller is a ValueError that names what was given and what was expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.runtime.fake import executor_of, tiny

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens: given 0, expected an integer of at least 1"),
    ({"max_new_tokens": True}, "max_new_tokens: given True, expected an integer"),
    ({"max_new_tokens": 2.0}, "max_new_tokens: given 2.0, expected an integer"),
    ({"max_new_tokens": None}, "max_new_tokens: given None, expected an integer"),
    ({"temperature": math.nan}, "temperature: given nan, expected a number of at least 0"),
    ({"temperature": math.inf}, "temperature: given inf"),
    ({"temperature": -0.1}, "temperature: given -0.1"),
    ({"temperature": "1"}, "temperature: given '1'"),
    ({"temperature": True}, "temperature: given True"),
    ({"temperature": 10**400}, "temperature: given 1000"),
    ({"top_k": 0}, "top_k: given 0, expected an integer of at least 1 or None"),
    ({"top_k": 1.5}, "top_k: given 1.5"),
    ({"top_p": 0}, "top_p: given 0, expected a number above 0 and at most 1 or None"),
    ({"top_p": 1.01}, "top_p: given 1.01"),
    ({"min_p": -1}, "min_p: given -1, expected a number of at least 0 and at most 1 or None"),
    ({"min_p": np.nan}, "min_p: given nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: given 0.0, expected a number above 0"),
    ({"repetition_penalty": None}, "repetition_penalty: given None"),
    ({"seed": -1}, "seed: given -1, expected an integer from 0 to 18446744073709551615 or None"),
    ({"seed": 1 << 64}, "seed: given 18446744073709551616"),
    ({"stop": ""}, "stop: given an empty string"),
    ({"stop": [1, 31]}, "stop: token id: given 31, expected an integer from 0 to 30"),
    ({"stop": 1.5}, "stop: given 1.5, expected text, a token id, a list of them, or None"),
    ({"stop": b"x"}, "stop: given b'x'"),
    ({"stop": [None]}, "stop: token id: given None"),
    ({"stop": "x"}, "stop: given text, expected token ids: the package has no tokenizer"),
    ({"profile": 1}, "profile: given 1, expected True or False"),
    ({"ignore_eos": "no"}, "ignore_eos: given 'no', expected True or False"),
]

PROMPTS: list[tuple[Any, str]] = [
    ("text", "prompt: given text, expected a list of token ids: the package has no tokenizer"),
    ([], "prompt: given an empty list"),
    ([[]], "token ids: the list is empty"),
    (None, "prompt: given None, expected text, a list of token ids, or a list of prompts"),
    (7, "prompt: given 7"),
    (b"x", "prompt: given b'x'"),
    ({1: 2}, "prompt: given {1: 2}"),
    ([1, "a"], "prompt: given a list that mixes kinds"),
    ([1, [2]], "prompt: given a list that mixes kinds"),
    (["a", [2]], "prompt: given a list that mixes kinds"),
    ([1, 31], "token id at position 1: given 31, expected an integer from 0 to 30"),
    ([1, -1], "token id at position 1: given -1"),
    ([True], "token id at position 0: given True"),
    ([1.0], "token id at position 0: given 1.0"),
    ([[1], [[2]]], "token id at position 0: given"),
    (np.zeros((1, 2)), "token id at position 0: given 0.0"),
    ([1] * 49, "prompt: given 49 tokens, expected at most 48, the context of this package"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_options(options: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError) as caught:
        model.generate([1], **options)
    assert message in str(caught.value)
    assert executor_of(model).batches == [], "nothing is computed before the arguments are checked"


@pytest.mark.parametrize(("prompt", "message"), PROMPTS)
def test_prompts(prompt: Any, message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError) as caught:
        model.generate(prompt)
    assert message in str(caught.value)
    assert executor_of(model).batches == []


def test_a_bad_prompt_among_good_ones_is_found_first() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="given 99"):
        model.generate([[1], [2], [99]])
    assert executor_of(model).batches == []


def test_numpy_numbers_are_numbers() -> None:
    model = tiny()
    numbers: dict[str, Any] = {"max_new_tokens": np.int32(3), "temperature": np.float32(0.5), "seed": np.uint64(9)}
    found = model.generate(np.array([1, 2], np.int64), top_k=np.int64(4), **numbers)
    assert found.token_ids == model.generate([1, 2], 3, temperature=0.5, top_k=4, seed=9).token_ids


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        tiny().generate([1], temprature=1.0)


@pytest.mark.parametrize(("context", "shown"), [(0, "0"), (49, "49"), (True, "True"), (2.0, "2.0")])
def test_the_context_of_perplexity(context: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=f"context: given {shown}, expected an integer from 1 to 48"):
        tiny().perplexity([1, 2, 3], context=context)


def test_one_token_has_no_perplexity() -> None:
    with pytest.raises(ValueError, match="given 1 token, expected at least 2"):
        tiny().perplexity([1], context=8)
