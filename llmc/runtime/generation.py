"""Continues prompts: prefill in chunks, decode together, leave when finished; a step of the model at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from .arguments import GenerationOptions
from .batch import Chunk, Int32, StepOutput
from .completion import Completion, Piece
from .engine import Engine, as_token_array
from .errors import ModelError
from .sampler import next_token, sampling_row
from .sequence import Sequence
from .stopping import StopStrings
from .timings import Profile, Timings
from .tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True)
class Event:
    """One generated token: the index of its prompt, and the text that became certain with it."""

    prompt: int
    piece: Piece


class _Request:
    """One prompt on its way: waiting, then prefilled, then decoded token by token, then finished."""

    def __init__(self, index: int, prompt: list[int], draw_key: int, room: int, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.prompt = prompt
        self.draw_key = draw_key
        self.room = room
        self.detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self.stops = StopStrings(())
        self.sequence: Sequence | None = None
        self.generated: list[int] = []
        self.pieces: list[str] = []
        self.seen: set[int] = set(prompt)
        self.finish_reason: str | None = None

    @property
    def length(self) -> int:
        """How many tokens the model has read."""
        return self.sequence.length if self.sequence else 0

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be read."""
        return self.length < len(self.prompt)

    def next_chunk(self, most: int) -> tuple[Int32, int]:
        """The tokens that it reads in the next step, at most that many, and how many rows it wants."""
        if not self.prefilling:
            return as_token_array(self.generated[-1:]), 1
        tokens = self.prompt[self.length : self.length + most]
        return as_token_array(tokens), int(self.length + len(tokens) == len(self.prompt))


class Generation:
    """Completions of several prompts (lists of token ids, already checked) with the same options.

    Prompts beyond the engine's batch limit wait, and so do those for which the key/value memory has no room yet: a
    sequence is admitted with all the blocks that it may come to need. Draws are keyed by the seed, the token's
    position, and how many times the same prompt came before in this call; so a prompt's completion depends neither on
    the other prompts nor on how they are batched, and copies of a prompt get different ones.

    The caller holds `engine.exclusive()` around `advance`, and not around `close`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        prompts: Items[list[int]],
        options: GenerationOptions,
        seed: int,
        eos_token_ids: Items[int],
        profile: bool,
    ) -> None:
        self.engine = engine
        self.options = options
        self.seed = seed
        self.timings = Timings()
        self._profile = Profile() if profile else None
        # A device that samples knows no repetition penalty.
        self._draws_here = not engine.executor.samples_on_device or options.repetition_penalty != 1.0
        self._end_ids = options.stop_token_ids | (frozenset() if options.ignore_eos else frozenset(eos_token_ids))
        copies: Counter[tuple[int, ...]] = Counter()
        self.requests = []
        for index, prompt in enumerate(prompts):
            # The last token of a completion is never read, so it needs no place in the context.
            room = min(options.max_new_tokens, engine.max_sequence_length + 1 - len(prompt))
            request = _Request(index, prompt, copies[tuple(prompt)], room, tokenizer)
            request.stops = StopStrings(options.stop_strings)
            copies[tuple(prompt)] += 1
            self.requests.append(request)
        self._waiting = deque(self.requests)
        self._running: list[_Request] = []

    @property
    def finished(self) -> bool:
        """Whether every prompt has its completion."""
        return not self._waiting and not self._running

    def advance(self) -> list[Event]:
        """One step: of prompts while any is unread, else of all running sequences. Gives the tokens that came out."""
        self._admit()
        reading = [request for request in self._running if request.prefilling]
        chunks: list[Chunk] = []
        taken: list[_Request] = []
        left = self.engine.max_tokens
        for request in reading or self._running:
            if left == 0:
                break
            tokens, outputs = request.next_chunk(left)
            assert request.sequence is not None
            request.sequence.begin(tokens)
            sampling = self._sampling(request, len(tokens)) if outputs else None
            chunks.append(Chunk(request.sequence.table, tokens, outputs, sampling))
            taken.append(request)
            left -= len(tokens)
        started = time.perf_counter()
        output = self.engine.forward(chunks, self._profile)
        elapsed = time.perf_counter() - started
        (self.timings.add_prefill if reading else self.timings.add_decode)(self.engine.max_tokens - left, elapsed)
        events, row = [], 0
        for request, chunk in zip(taken, chunks, strict=True):
            if chunk.outputs:
                events.append(self._take(request, output.rows(row, row + 1)))
                row += 1
        self._running = [request for request in self._running if request.finish_reason is None]
        return events

    def completions(self) -> list[Completion]:
        """What came out, in the order of the prompts."""
        if self._profile:
            self.timings.profile = self._profile.rows()
        seed = None if self.options.greedy and self.options.seed is None else self.seed
        return [
            Completion("".join(r.pieces), r.generated, r.finish_reason or "length", self.timings, seed, r.prompt)
            for r in self.requests
        ]

    def close(self) -> None:
        """Give all blocks back; what is unfinished stays so."""
        self._running = []
        self._waiting.clear()
        self.engine.discard([request.sequence.table for request in self.requests if request.sequence])

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.engine.max_sequences:
            request = self._waiting[0]
            sequence = Sequence(self.engine)
            # The last token that is generated is not read.
            if not self.engine.promise(sequence.table, len(request.prompt) + request.room - 1):
                if self._running:
                    return  # when one of those has finished there is more room
                blocks = min(self.engine.managers, key=lambda manager: manager.num_available / manager.num_blocks)
                raise ModelError(
                    f"the key/value memory is full: {blocks.num_available} of {blocks.num_blocks} blocks are free; "
                    "finish or close other streams and sequences first"
                )
            request.sequence = sequence
            self._running.append(request)
            self._waiting.popleft()

    def _sampling(self, request: _Request, tokens: int) -> tuple[int, ...] | None:
        """How the device is to draw the token after the next `tokens` tokens; None where it takes the first maximum."""
        if self._draws_here or self.options.greedy:
            return None
        return sampling_row(self.options, self.seed, request.draw_key, request.length + tokens)

    def _choose(self, request: _Request, row: StepOutput) -> int:
        """The next token of a request, whose row of logits this is."""
        options = self.options
        if not self._draws_here and row.chosen is not None:
            token = int(row.chosen[0])
            if not 0 <= token < self.engine.executor.vocab_size:
                raise ModelError("the logits are not finite: the model's arithmetic overflowed on this prompt")
            return token
        if options.plain:  # nobody needs the logits, which may be far away
            return int(row.greedy[0])
        seen = np.fromiter(request.seen, np.intp) if options.repetition_penalty != 1.0 else None
        return next_token(row.logits[0], int(row.greedy[0]), options, seen, self.seed, request.draw_key, request.length)

    def _take(self, request: _Request, row: StepOutput) -> Event:
        """Choose the next token of a request from its row of logits, and see whether it is the last."""
        token = self._choose(request, row)
        request.generated.append(token)
        request.seen.add(token)
        ended = token in self._end_ids
        text = ""
        if request.detokenizer:
            text = request.stops.push(request.detokenizer.flush() if ended else request.detokenizer.push(token))
        if ended or request.stops.stopped:
            request.finish_reason = "stop"
        elif len(request.generated) == request.room:
            request.finish_reason = "length"
            if request.detokenizer:
                text += request.stops.push(request.detokenizer.flush())
        if request.finish_reason:
            text += request.stops.flush()
            if request.stops.stopped:
                request.finish_reason = "stop"
            assert request.sequence is not None
            request.sequence.free()
        request.pieces.append(text)
        return Event(request.index, Piece(text, token, request.finish_reason))
