"""The loop around a backend: reuse, guesses, policies, constraints; on a model that can be followed by hand."""

import time

import numpy as np
import pytest

from phi_runtime.errors import ContextError, TokenError, UsageError
from phi_runtime.generation.engine import CHUNK, Engine
from phi_runtime.generation.prompt_lookup import PromptLookup
from phi_runtime.generation.sampler import Sampling

VOCABULARY = 50


class Counting:
    """The next token is a function of all before; it records what it reads. With `cycle`, its text repeats itself."""

    name, vocab_size = "counting", VOCABULARY

    def __init__(self, context=64, cycle=None):
        self.context, self.cycle = context, cycle
        self.tokens, self.read = [], []

    @property
    def position(self):
        return len(self.tokens)

    def forward(self, tokens, all_logits):
        assert len(self.tokens) + len(tokens) <= self.context
        self.read.append(list(tokens))
        rows = []
        for token in tokens:
            self.tokens.append(token)
            if self.cycle:
                best = (token + 1) % self.cycle
            else:
                best = (7 * sum((i + 1) * t for i, t in enumerate(self.tokens)) + 3) % (VOCABULARY - 1)
            row = np.random.default_rng(best).standard_normal(VOCABULARY).astype(np.float32)
            row[best] += 6
            rows.append(row)
        return np.stack(rows if all_logits else rows[-1:])

    def trim(self, position):
        del self.tokens[position:]

    def close(self):
        pass


class Slow(Counting):
    """Takes a while for a pass, as a large model does, so that a guess is worth one of a small one."""

    def forward(self, tokens, all_logits):
        time.sleep(0.005)
        return super().forward(tokens, all_logits)


def tokens(engine, prompt, count=12, **options):
    sampling = Sampling(**options.pop("sampling", {}))
    return [s.token for s in engine.stream(prompt, count, sampling, **options)]


def test_a_prompt_that_begins_as_the_last_text_is_read_from_there():
    backend = Counting()
    engine = Engine(backend, ())
    first = tokens(engine, [1, 2, 3, 4])
    said = [1, 2, 3, 4, *first]
    backend.read.clear()
    steps = list(engine.stream([*said, 9, 8], 3, Sampling()))
    assert backend.read[0] == [first[-1], 9, 8] and steps[0].reused == len(said) - 1 and steps[1].reused == 0
    assert [s.token for s in steps] == tokens(Engine(Counting(), ()), [*said, 9, 8], 3)
    # The very same prompt again: its last token has to be read for its logits.
    backend.read.clear()
    assert tokens(engine, [*said, 9, 8], 3) == [s.token for s in steps]
    assert backend.read[0] == [8]


def test_a_stream_left_early_does_not_spoil_the_next():
    engine = Engine(Counting(), ())
    stream = engine.stream([1, 2, 3], 20, Sampling())
    for _ in range(4):
        next(stream)
    stream.close()
    assert tokens(engine, [1, 2, 9]) == tokens(Engine(Counting(), ()), [1, 2, 9])


def test_an_engine_that_fails_in_the_middle_is_read_anew():
    backend = Counting()
    engine = Engine(backend, ())
    expected = tokens(engine, [1, 2, 3])
    forward, backend.forward = backend.forward, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        tokens(engine, [1, 2, 3, 4])
    backend.forward = forward
    assert tokens(engine, [1, 2, 3]) == expected


@pytest.mark.parametrize("cycle", [None, 5, 17])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}])
def test_guesses_change_no_token(cycle, sampling):
    for n in (1, 2, 7, 40):
        plain, guessed = (
            tokens(Engine(Counting(96, cycle), ()), [1, 2, 3, 4, 1, 2, 3], n, speculate=on, sampling=sampling)
            for on in (False, True)
        )
        assert plain == guessed and len(plain) == n


def test_guesses_save_passes_where_the_text_repeats_itself():
    backend = Slow(512, 9)
    assert len(tokens(Engine(backend, ()), [0], 300)) == 300
    assert len(backend.read) < 60
    assert backend.position <= 300


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_draft_changes_no_token_and_saves_passes(seed):
    backend, draft = Slow(256), Counting(256)
    engine = Engine(backend, ())
    engine.draft = Engine(draft, ())
    prompt = [seed, 5, 9]
    assert tokens(engine, prompt, 200) == tokens(Engine(Counting(256), ()), prompt, 200, speculate=False)
    assert len(backend.read) < 60, "its own twin is always right"
    wrong = Engine(Counting(256), ())
    wrong.draft = Engine(Counting(256, 11), ())
    assert tokens(wrong, prompt, 200) == tokens(Engine(Counting(256), ()), prompt, 200, speculate=False)
    short = Engine(Counting(256), ())
    short.draft = Engine(Counting(40), ())  # its context ends first
    assert tokens(short, prompt, 200) == tokens(Engine(Counting(256), ()), prompt, 200, speculate=False)


def test_stopping_inside_a_guess_leaves_a_cache_that_is_true():
    for stop in range(5):
        backend = Counting(128, 9)
        engine = Engine(backend, ())
        list(engine.stream([0], 40, Sampling()))
        engine.stop_tokens = frozenset([stop])
        steps = list(engine.stream([0, 1, 2, 3, 4, 5, 6, 7, 8] * 4, 60, Sampling()))
        assert steps[-1].finish_reason == "stop_token" and steps[-1].token == stop
        assert engine.cached_tokens == backend.tokens
        assert stop not in backend.tokens[36:]


def test_guessing_rests_where_it_does_not_pay():
    lookup = PromptLookup([1, 2, 3, 4, 1, 2, 3])
    lookup.record(0, 0, 1.0)
    offered = 0
    for _ in range(40):
        if guess := lookup.propose(8):
            offered += 1
            lookup.record(len(guess), 0, 3.0)  # wide passes that bring one token each
    assert 1 < offered <= 8
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3]).propose(8) == []  # nothing is known of the cost yet


def test_policies():
    with pytest.raises(ContextError, match="choose another context policy"):
        tokens(Engine(Counting(16), ()), [1] * 17)
    steps = list(Engine(Counting(16), ()).stream([1] * 10, 30, Sampling()))
    assert steps[-1].finish_reason == "context" and len(steps) == 7
    long = list(range(40))
    steps = list(Engine(Counting(16), ()).stream(long, 4, Sampling(), "truncate-left"))
    assert steps[0].dropped == 40 - 12 and len(steps) == 4 and steps[-1].finish_reason == "max_tokens"
    assert [s.token for s in steps] == tokens(Engine(Counting(16), ()), long[-12:], 4)
    backend = Counting(16)
    steps = list(Engine(backend, ()).stream(long, 50, Sampling(), "sliding-window"))
    assert len(steps) == 50 and steps[-1].finish_reason == "max_tokens"
    assert steps[0].dropped == 24 and sum(s.dropped > 0 for s in steps[1:]) >= 5
    with pytest.raises(UsageError, match="no context policy"):
        tokens(Engine(Counting(16), ()), [1], policy="hope")
    for at in (15, 16):  # around the edge
        assert list(Engine(Counting(16), ()).stream([1] * at, 5, Sampling()))[-1].finish_reason == "context"


def test_after_a_slide_the_text_goes_on_as_if_the_newer_half_had_been_the_prompt():
    steps = list(Engine(Counting(16), ()).stream([1, 2, 3], 40, Sampling(), "sliding-window", speculate=False))
    said = [1, 2, 3, *(s.token for s in steps)]
    slid = next(i for i, s in enumerate(steps) if s.dropped)
    kept = said[3 + slid - 9 : 3 + slid]
    assert tokens(Engine(Counting(16), ()), kept, 3) == [s.token for s in steps[slid : slid + 3]]


def test_a_prompt_is_abandoned_between_chunks_and_taken_up_there():
    backend = Counting(2048)
    engine = Engine(backend, ())
    prompt = [i % 7 for i in range(1000)]
    forward = backend.forward

    def impatient(tokens, all_logits):
        engine.cancelled = len(backend.read) == 2
        return forward(tokens, all_logits)

    backend.forward = impatient
    assert tokens(engine, prompt) == []
    assert engine.cached_tokens == prompt[: 3 * CHUNK] == backend.tokens
    backend.forward = forward
    assert tokens(engine, prompt) == tokens(Engine(Counting(2048), ()), prompt)


def test_a_constraint_is_kept_and_told():
    class Even:
        def __init__(self):
            self.told = []

        def mask(self, logits):
            return np.where(np.arange(VOCABULARY) % 2 == 0, logits, -np.inf).astype(np.float32)

        def accept(self, token):
            self.told.append(token)

    even = Even()
    found = tokens(Engine(Counting(), ()), [1, 2, 3], 10, constraint=even)
    assert all(t % 2 == 0 for t in found) and even.told == found[:-1]


def test_what_cannot_be_asked():
    engine = Engine(Counting(), ())
    for bad in ([], [-1], [VOCABULARY]):
        with pytest.raises(TokenError):
            tokens(engine, bad)
    with pytest.raises(UsageError):
        tokens(engine, [1], 0)
