"""Prompts have exact lengths, share exactly what the trace shares, and are otherwise never alike."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import UsageError
from tuner.load import prompts
from tuner.load.sharing import recent, shared_tokens, sharing, to_fill_s
from tuner.load.trace import Trace, with_earlier
from tuner.load.windows import cut


def trace_of(requests: list[tuple[int, list[int]]], block_tokens: int = 16) -> Trace:
    """A trace from (input tokens, block ids) pairs."""
    lengths, ids = [length for length, _ in requests], [i for _, blocks in requests for i in blocks]
    offsets = np.concatenate([[0], np.cumsum([len(blocks) for _, blocks in requests])]).astype(np.int64)
    n = len(requests)
    return Trace(
        "t", np.arange(float(n)), np.array(lengths), np.ones(n, int), block_tokens, np.array(ids, np.int64), offsets
    )


def common(one, other) -> int:
    """How many leading tokens two prompts share."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differ[0]) if len(differ) else n


def shared_by_blocks(trace: Trace, i: int, j: int) -> int:
    """How many leading tokens the trace says that two requests share."""
    one, other = (trace.block_ids[trace.block_offsets[k] : trace.block_offsets[k + 1]].tolist() for k in (i, j))
    equal = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        equal += 1
    covered = equal * trace.block_tokens
    return min(covered, int(trace.input_tokens[i]), int(trace.input_tokens[j]))


def lengths_and_blocks(width: int):
    def request(length: int):
        most = -(-length // width)
        return st.tuples(st.just(length), st.lists(st.integers(0, 3), max_size=most))

    return st.integers(1, 60).flatmap(request)


@settings(deadline=None)
@given(st.lists(lengths_and_blocks(8), min_size=1, max_size=12), st.integers(-5, 2**70))
def test_prompts_have_their_length_and_share_exactly_what_the_blocks_share(requests, seed):
    trace = trace_of(requests, block_tokens=8)
    made = list(prompts.token_ids(trace, 50_000, [0, 7], seed))
    assert [len(ids) for ids in made] == trace.input_tokens.tolist()
    for i in range(len(trace)):
        for j in range(i):
            assert common(made[i], made[j]) == shared_by_blocks(trace, i, j)


@settings(deadline=None)
@given(st.lists(lengths_and_blocks(8), min_size=1, max_size=12))
def test_the_sharing_that_is_computed_is_the_sharing_that_prompts_have(requests):
    trace = trace_of(requests, block_tokens=8)
    made = list(prompts.token_ids(trace, 50_000, [], 1))
    truth = [max((common(made[i], made[j]) for j in range(i)), default=0) for i in range(len(made))]
    assert shared_tokens(trace).tolist() == truth
    assert sharing(trace).shared_tokens == sum(truth)
    # an engine with blocks of 4 finds whole blocks and leaves the last token to compute
    engine = [min(share, len(ids) - 1) // 4 * 4 for share, ids in zip(truth, made, strict=True)]
    assert shared_tokens(trace, engine_block_tokens=4).tolist() == engine


def test_the_same_block_after_another_prefix_is_not_counted_as_shared():
    trace = trace_of([(32, [1, 2]), (32, [3, 2]), (32, [1, 2])])
    assert shared_tokens(trace).tolist() == [0, 0, 32]
    assert (sharing(trace).blocks, sharing(trace).seen_blocks) == (6, 2)


def test_a_partial_last_block_is_the_beginning_of_its_block():
    short, long = prompts.token_ids(trace_of([(20, [1, 2]), (32, [1, 2])]), 1000, [], 3)
    assert short.tolist() == long[:20].tolist()


def test_special_ids_are_never_used_and_all_others_are():
    trace = trace_of([(5000, [])] * 4, block_tokens=0)
    special = {0, 3, 49, 77}
    used = set(np.concatenate(list(prompts.token_ids(trace, 50, special, 1))).tolist())
    assert used == set(range(50)) - special


@pytest.mark.parametrize(("vocab_size", "tokens"), [(40, 2), (3000, 1), (6, 5)])
def test_no_two_requests_are_alike_however_short_while_there_are_enough_prompts_of_that_length(vocab_size, tokens):
    """1,500 requests of one length: as few tokens as can tell them apart do."""
    trace = trace_of([(tokens, [])] * 1500, block_tokens=0)
    made = {tuple(ids) for ids in prompts.token_ids(trace, vocab_size, [], 5)}
    assert len(made) == 1500


def test_seeds_give_other_prompts_and_the_same_seed_the_same():
    trace = trace_of([(100, [1, 2]), (100, [])])
    first, again, other = (list(prompts.token_ids(trace, 32_000, [0], seed)) for seed in (1, 1, 2))
    for i in range(2):
        assert first[i].tolist() == again[i].tolist()
        assert common(first[i], other[i]) < 4


def test_prompts_are_the_same_on_every_machine_and_in_every_release():
    """Two studies years apart must replay the same prompts: this changes only with a new seed."""
    trace = trace_of([(40, [1, 2, 3]), (1000, [1])])
    digest = hashlib.sha256(b"".join(ids.astype("<i4").tobytes() for ids in prompts.token_ids(trace, 151_643, [0], 42)))
    assert digest.hexdigest()[:16] == "05978905c7bfb331"


def test_prompts_are_made_one_at_a_time_for_a_million_requests():
    n = 1_000_000
    trace = Trace(
        "t", np.zeros(n), np.full(n, 100_000), np.ones(n, int), 0, np.empty(0, np.int64), np.zeros(n + 1, int)
    )
    made = prompts.token_ids(trace, 32_000, [], 0)  # all of them would be 400 GB
    assert len(made) == n
    assert made[-1].dtype == np.int32 and len(made[999_999]) == 100_000
    assert made[-1].tolist() == made[999_999].tolist()
    assert len(made[5:7]) == 2
    with pytest.raises(IndexError):
        made[n]


@pytest.mark.parametrize(("vocab_size", "special"), [(0, []), (5, range(4)), (2**40, [])])
def test_a_vocabulary_that_cannot_write_prompts_is_refused(vocab_size, special):
    with pytest.raises(UsageError):
        prompts.token_ids(trace_of([(1, [])]), vocab_size, special, 0)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE as most served models have, trained on the words of this sentence and made-up ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(400)]
    text = [" ".join(rng.choice(words, 50)) for _ in range(400)] + words * 20
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<|end|>", "<|image|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text, trainer)
    return made


def test_texts_have_exactly_the_wanted_tokens_and_share_the_same_prefixes(tokenizer):
    trace = trace_of([(50, [1, 2, 3, 4]), (70, [1, 2, 9]), (33, []), (1, [])])
    made = prompts.PromptTexts(trace, prompts.whole_words(tokenizer), 7)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in made]
    assert [len(ids) for ids in encoded] == [50, 70, 33, 1]
    assert common(encoded[0], encoded[1]) == 32
    assert common(encoded[0], encoded[2]) < 3
    assert all(text == text.strip() for text in made)  # chat templates strip


def test_texts_leave_room_for_the_chat_template(tokenizer):
    made = prompts.PromptTexts(trace_of([(50, [1]), (3, [])]), prompts.whole_words(tokenizer), 7, 10)
    assert [len(tokenizer.encode(text).ids) for text in made] == [40, 1]


def test_a_tokenizer_without_whole_words_has_too_few_to_write_prompts_with():
    from tokenizers import Tokenizer, models, pre_tokenizers

    few = Tokenizer(models.WordLevel({f"a{chr(i)}": i - 97 for i in range(97, 123)}, unk_token="aa"))
    few.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert not prompts.whole_words(few)


def test_the_vocabulary_is_what_tokenizer_and_model_both_know(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    known = tokenizer.get_vocab_size()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    for padded, expected in ((known + 100, known), (known - 100, known - 100)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": padded, "bos_token_id": 5}))
        assert prompts.vocabulary(tmp_path) == (expected, {0, 1, 5, 11, 12})
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 99, "pad_token_id": 4}}))
    assert prompts.vocabulary(tmp_path) == (99, {0, 1, 4, 11, 12})


def test_a_model_that_is_not_there_or_says_nothing_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="vocabulary"):
        prompts.vocabulary(tmp_path)
    with pytest.raises(UsageError, match="neither a folder"):
        prompts.vocabulary("nobody/no-such-model")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        prompts.load_tokenizer(tmp_path)


requests_of_few_blocks = st.lists(lengths_and_blocks(8), min_size=2, max_size=12)


@settings(deadline=None)
@given(requests_of_few_blocks, st.integers(1, 11))
def test_a_window_shares_with_what_came_before_it_what_the_whole_trace_shares_there(requests, first):
    trace = trace_of(requests, block_tokens=8)
    first = min(first, len(trace) - 1)
    window = replace(cut(trace, first, len(trace)), earlier=cut(trace, 0, first))
    assert shared_tokens(window).tolist() == shared_tokens(trace)[first:].tolist()
    assert with_earlier(window).arrival_s.tolist() == trace.arrival_s.tolist()
    assert with_earlier(window).until_s == trace.until_s


@settings(deadline=None)
@given(requests_of_few_blocks, st.integers(0, 300))
def test_the_last_requests_that_a_cache_has_room_for_are_kept(requests, room):
    """Counted anew from the prompts themselves: tokens that differ, and each response's."""
    trace = trace_of(requests, block_tokens=8)
    made = [tuple(ids.tolist()) for ids in prompts.token_ids(trace, 50_000, [], 1)]

    def size(first: int) -> int:
        beginnings = {ids[: k + 1] for ids in made[first:] for k in range(len(ids))}
        return len(beginnings) + int(trace.output_tokens[first:].sum())

    fits = [first for first in range(len(made)) if size(first) <= room]
    kept = recent(trace, room)
    assert (len(kept) if kept else 0) == (len(made) - fits[0] if fits else 0)
    assert recent(trace, float("inf")).input_tokens.tolist() == trace.input_tokens.tolist()


def turns(every_s: float, blocks: int = 4, seconds: int = 400) -> Trace:
    """Two requests a second, each of which goes on with the prompt of so many seconds ago, of so many blocks."""
    apart = round(2 * every_s)
    trace = trace_of([(16 * blocks + 16, [*(1000 * (i % apart) + k for k in range(blocks)), 10**6 + i])
                      for i in range(2 * seconds)])  # fmt: skip
    return replace(trace, arrival_s=trace.arrival_s / 2)


def test_what_is_sent_before_a_window_holds_what_its_prompts_begin_with():
    assert to_fill_s(turns(25.0), warmup_s=5.0) == 30
    assert to_fill_s(turns(31.0), warmup_s=5.0) == 60
    assert to_fill_s(turns(25.0), warmup_s=25.0) == 0  # the warm-up has sent it
    assert to_fill_s(turns(1.0), warmup_s=5.0) == 0  # a system prompt
    assert to_fill_s(trace_of([(160, [1]), *((160, [1, k]) for k in range(2, 400))]), warmup_s=0.0) == 10
    assert to_fill_s(trace_of([(400, [1]), *((400, [1, k]) for k in range(2, 400))]), warmup_s=0.0) == 0  # too little


def test_a_trace_keeps_three_quarters_of_its_time_and_of_its_requests_for_windows():
    assert to_fill_s(turns(200.0), warmup_s=5.0) == 60  # of 400 s
    early = turns(25.0)
    late = replace(early, arrival_s=np.where(early.arrival_s < 160, early.arrival_s / 40, early.arrival_s))
    assert to_fill_s(late, warmup_s=5.0) == 0 < to_fill_s(early, warmup_s=5.0)  # two fifths came in four seconds
    assert to_fill_s(trace_of([(16, [1])]), warmup_s=5.0) == 0
    assert to_fill_s(trace_of([(16, [])] * 9), warmup_s=5.0) == 0
