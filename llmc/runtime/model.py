"""The model of a package: load it, generate, score, verify."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from .arguments import GenerationOptions, Prompt, flag, integer, parse_options, split_prompts, token_id_list
from .batch import Executor, Float32
from .chat import ChatTemplate, missing_template
from .completion import Completion, Piece
from .document import Field
from .engine import Engine
from .errors import ModelError
from .generation import Generation
from .manifest import ModelFacts
from .scoring import all_logits, perplexity
from .sequence import Sequence
from .tokenizer import Tokenizer
from .verify import VerifyReport, read_checks, verify


class Model:
    """A loaded model. `generate`, `stream`, `chat`, `logits`, `perplexity`, `verify`; `close` or `with` gives it back.

    Any number of threads may use it; their steps are taken one at a time. Errors: `ValueError` for a bad argument,
    `ModelError` for the rest. An interrupt leaves the model usable.

    Parameters: what executes its steps, its sizes and special tokens, its tokenizer and chat template where it has
    them, the stored checks, and the manifest for `info`. `load.load_model` makes all that from a package's folder.
    """

    def __init__(
        self,
        executor: Executor,
        facts: ModelFacts,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        checks: Field | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self._engine = Engine(executor, facts.max_sequence_length)
        self._facts = facts
        self._tokenizer = tokenizer
        self._template = template
        self._checks = checks
        self.info: dict[str, Any] = info or {}
        """The manifest: model, target, quantization, kernels, sizes, versions; and what was chosen at load."""

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode(text) -> list[int]`, `decode(ids) -> str`. Raises `ModelError` for a package without one."""
        if self._tokenizer is None:
            raise ModelError("the package has no tokenizer: pass token ids instead of text")
        return self._tokenizer

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue a prompt (text, or one list of token ids): a `Completion`. A list of prompts: a list of them.

        Options, with their defaults: `temperature` 0.0 (greedy: the first maximum, always the same), `top_k` None,
        `top_p` None, `min_p` None, `repetition_penalty` 1.0, `seed` None (a random one, named in the completion),
        `stop` None (text, a token id, or a list of them), `ignore_eos` False, `profile` False (time every launch).
        At most `max_new_tokens` come out, fewer when the context is full. Prompts are decoded together, and each gets
        what it would get alone. Raises `ValueError` for a bad argument, before anything is computed.
        """
        prompts, single = split_prompts(prompt)
        generation = self._start(prompts, max_new_tokens, **options)
        try:
            with self._engine.exclusive():
                while not generation.finished:
                    generation.advance()
        finally:
            generation.close()
        completions = generation.completions()
        return completions[0] if single else completions

    def stream(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Iterator[Piece]:
        """Continue one prompt piece by piece: an iterator with one `Piece` for each token, as soon as it is there.

        The pieces joined are the text that `generate` gives. Options as in `generate`; they are checked at once.
        Closing or dropping the iterator gives its memory back; between pieces the model may be used for other things.
        """
        prompts, single = split_prompts(prompt)
        if not single:
            raise ValueError(f"prompt: given a list of {len(prompts)} prompts, expected one; use generate for several")
        return self._pieces(self._start(prompts, max_new_tokens, **options))

    def chat(
        self,
        messages: Any,
        tools: Any = None,
        add_generation_prompt: bool = True,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Completion:
        """Answer a conversation, `[{"role": "user", "content": "hi"}]`; options as in `generate`.

        Raises `ModelError` when the package has no chat template or jinja2 is not installed.
        """
        prompt = self.chat_prompt(messages, tools, add_generation_prompt)
        completion = self.generate(prompt, max_new_tokens, **options)
        assert isinstance(completion, Completion)
        return completion

    def chat_prompt(
        self, messages: Any, tools: Any = None, add_generation_prompt: bool = True, variables: Any = None
    ) -> list[int]:
        """The token ids of a conversation by the chat template, for `generate`, `stream` or `logits`."""
        if self._template is None:
            raise missing_template()
        text = self._template.render(messages, tools, add_generation_prompt, variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def logits(self, token_ids: Any) -> Float32:
        """The logits after each of the token ids, f32[len(token_ids), vocab_size], in one causal pass."""
        ids = token_id_list(token_ids, self._facts.vocab_size)
        self._check_length(ids)
        return all_logits(self._engine, ids)

    def perplexity(self, text_or_token_ids: Prompt, context: int = 512) -> float:
        """exp of the mean negative log-likelihood of every token but the first; see `scoring.perplexity`.

        Text is encoded as a prompt is (so the first token is the beginning token, where the tokenizer adds one).
        """
        context = integer("context", context, 1, self._facts.max_sequence_length)
        ids = self._encode(text_or_token_ids)
        if len(ids) < 2:
            raise ValueError(f"perplexity: given {len(ids)} token, expected at least 2: one to read and one to predict")
        return perplexity(self._engine, ids, context)

    def verify(self) -> VerifyReport:
        """Compute the checks that were stored when the package was compiled. `print(model.verify())` shows them."""
        if self._checks is None:
            raise ModelError("the package has no checks.json: there is nothing to verify against")
        return verify(self._engine, *read_checks(self._checks, self._facts.vocab_size, self._facts.max_sequence_length))

    def sequence(self) -> Sequence:
        """A new, empty sequence, to be advanced, forked and rolled back by hand."""
        return Sequence(self._engine)

    def close(self) -> None:
        """Give memory and threads back. Every later use raises `ModelError`; closing twice is fine."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        prompts: list[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Any = None,
        profile: bool = False,
        ignore_eos: bool = False,
    ) -> Generation:
        options: GenerationOptions = parse_options(
            self._facts.vocab_size,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop,
            ignore_eos,
        )
        if options.stop_strings and self._tokenizer is None:
            raise ValueError("stop: given text, expected token ids: the package has no tokenizer")
        encoded = [self._encode(prompt) for prompt in prompts]
        for ids in encoded:
            self._check_length(ids)
        return Generation(
            self._engine,
            self._tokenizer,
            encoded,
            options,
            int.from_bytes(os.urandom(8), "little") if options.seed is None else options.seed,
            self._facts.eos_token_ids,
            flag("profile", profile),
        )

    def _pieces(self, generation: Generation) -> Iterator[Piece]:
        try:
            while not generation.finished:
                with self._engine.exclusive():
                    events = generation.advance()
                yield from (event.piece for event in events)
        finally:
            generation.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return token_id_list(prompt, self._facts.vocab_size)
        if self._tokenizer is None:
            raise ValueError("prompt: given text, expected a list of token ids: the package has no tokenizer")
        ids = self._tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt: the text is empty and the tokenizer adds no beginning token, expected some text")
        return token_id_list(ids, self._facts.vocab_size)

    def _check_length(self, ids: list[int]) -> None:
        longest = self._facts.max_sequence_length
        if len(ids) > longest:
            raise ValueError(
                f"prompt: given {len(ids)} tokens, expected at most {longest}, the context of this package"
            )
