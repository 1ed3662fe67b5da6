"""The parser of streamed responses: the same tokens however the bytes were split."""

import codecs
import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuner.load import alike
from tuner.load.sse import Response, spread

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*payloads: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in payloads if p) + b"0\r\n\r\n"


def event(data: dict, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(data).encode() + end


def completion(text: str, total: int | None = None, ids: list[int] | None = None) -> dict:
    choice: dict = {"index": 0, "text": text}
    if ids is not None:
        choice["token_ids"] = ids
    data: dict = {"choices": [choice]}
    if total is not None:
        data["usage"] = {"prompt_tokens": 5, "completion_tokens": total}
    return data


def final(total: int) -> dict:
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": total}}


def whole(stream: bytes, counting: str) -> Response:
    response = Response(counting)
    response.feed(1, stream)
    response.close()
    return response


@st.composite
def streams(draw):
    """(bytes, tokens per event, counting) of a well-formed response whose chunks cut events anywhere."""
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any))
    counting = draw(st.sampled_from(["usage", "ids"]))
    end = draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    texts = st.text(alphabet=st.sampled_from('ab"\\{}\n\r0é,:[]'), max_size=6)
    total, payload = 0, draw(st.sampled_from([b"", b": ping" + end, codecs.BOM_UTF8]))
    for count in counts:
        total += count
        text = draw(texts)
        one = completion(text, total) if counting == "usage" else completion(text, ids=list(range(count)))
        payload += event(one, end)
    payload += event(final(total), end) + b"data: [DONE]" + end
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=10)))
    parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    return HEAD + chunked(*parts), [c for c in counts if c], counting


@given(streams(), st.data())
def test_any_split_of_the_byte_stream_gives_the_same_tokens(stream, data):
    raw, counts, counting = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=40)))
    response = Response(counting)
    for time, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(raw)], strict=True)):
        response.feed(time, raw[a:b])
    response.close()
    assert [count for _, count in response.tokens] == counts
    assert response.complete and not response.error
    assert response.output_tokens == sum(counts) and response.prompt_tokens == 5


@given(streams(), st.data())
def test_reads_taken_together_give_what_they_give_one_by_one(stream, data):
    """Whether a read is one chunk, as nearly all are, or any piece of the stream."""
    raw, _, counting = stream
    at_chunks = [m.end() for m in re.finditer(rb"\r\n\r\n|\n\n\r\n", raw)]
    cuts = data.draw(st.lists(st.one_of(st.sampled_from(at_chunks), st.integers(0, len(raw))), max_size=40))
    cuts = sorted({0, len(raw), *(at_chunks if data.draw(st.booleans()) else []), *cuts})
    reads = [(time, raw[a:b]) for time, (a, b) in enumerate(pairwise(cuts))]
    groups = sorted({0, len(reads), *data.draw(st.lists(st.integers(0, len(reads)), max_size=5))})
    singly, together = Response(counting), Response(counting)
    for a, b in pairwise(groups):
        times, pieces = zip(*reads[a:b], strict=True)
        events = together.feed_all(times, [len(piece) for piece in pieces], b"".join(pieces))
        assert events == [singly.feed(time, piece) for time, piece in reads[a:b]]
    singly.close()
    together.close()
    assert together.tokens == singly.tokens and together.seen == singly.seen
    assert (together.error, together.output_tokens) == (singly.error, singly.output_tokens)


ONE, TWO, MORE = (b"%x\r\n%s\r\n" % (len(e), e) for e in (event(completion("a", t)) for t in (1, 2, 5)))
NONE, LAST = (b"%x\r\n%s\r\n" % (len(e), e) for e in (event(completion("a")), event(final(6))))


@pytest.mark.parametrize(
    ("reads", "counts"),
    [
        ([ONE, TWO, MORE], [1, 1, 3]),
        ([ONE, ONE], None),  # no token came with the second
        ([TWO], [2]),
        ([NONE, TWO], None),
        ([ONE, LAST], None),  # the totals, and no token
        ([ONE + TWO, MORE], None),
        ([ONE + TWO[:9], TWO[9:]], None),  # cut elsewhere than between two chunks
        ([ONE, TWO.replace(b'"a"', b'"\r"')], None),
        ([ONE, b"0" + TWO], None),  # a length of another form
        ([ONE, TWO.replace(b"data", b"DATA")], None),
    ],
)
def test_reads_are_taken_together_only_where_each_is_one_event_that_tells_the_count(reads, counts):
    assert alike.counts([len(read) for read in reads], b"".join(reads), 0) == counts


@given(streams())
def test_one_byte_at_a_time_gives_the_same_tokens_as_one_read(stream):
    raw, counts, counting = stream
    response = Response(counting)
    for k in range(len(raw)):
        response.feed(k, raw[k : k + 1])
    assert [count for _, count in response.tokens] == counts == [c for _, c in whole(raw, counting).tokens]


@given(
    st.lists(
        st.sampled_from(
            [
                event(completion('a"completion_tokens":9', 1)),
                event(completion("b", 2)),
                event(completion("b", 2), b"\r\n\r\n"),
                event(completion("c", 4)) + event(completion("d", 5)),
                event(completion("c", 4), b"\r\r") + event(completion("d", 5)),
                event(final(6)),
                event({"choices": [], "usage": {"completion_tokens": 7}}),
                event({"choices": [{"text": "e"}], "usage": None}),
                event({"error": "broken"}),
                b": ping\n\n",
                b'data: {"choices":[{"text":"f"}],"usage":{"completion_tokens":8}}\n',
                b'data: {"choices":[{"text":"g"}],\ndata: "usage":{"completion_tokens":9}}\n\n',
            ]
        ),
        max_size=8,
    )
)
def test_reads_of_one_chunk_each_give_the_same_tokens_as_one_read(payloads):
    raw = HEAD + chunked(*payloads)
    response = Response("usage")
    response.feed(1, HEAD)
    for payload in payloads:
        response.feed(1, b"%x\r\n%s\r\n" % (len(payload), payload))
    response.feed(1, b"0\r\n\r\n")
    response.close()
    once = whole(raw, "usage")
    assert (response.tokens, response.error, response.output_tokens) == (once.tokens, once.error, once.output_tokens)


def test_a_token_has_the_time_of_the_read_that_completed_its_event():
    first, second = (b"%x\r\n%s\r\n" % (len(e), e) for e in (event(completion("a", 1)), event(completion("b", 2))))
    response = Response("usage")
    response.feed(10, HEAD + first[:20])
    response.feed(20, first[20:])
    response.feed(30, second)
    assert response.tokens == [[20, 1], [30, 1]]


def test_several_tokens_in_one_event_are_several_tokens():
    raw = HEAD + chunked(event(completion("abc", 3)), event(completion("de", 5)), event(final(5)))
    assert whole(raw, "usage").tokens == [[1, 3], [1, 2]]


def test_tokens_without_a_text_of_their_own_came_with_the_end():
    """llama.cpp holds back the bytes of a character until it is whole; at the end they are gone."""
    last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    raw = HEAD + chunked(event({"choices": [{"text": "", "finish_reason": None}]}), event(last), b"data: [DONE]\n\n")
    response = whole(raw, "total")
    assert (response.error, response.output_tokens, response.tokens) == ("", 2, [[1, 2]])


def test_the_first_chat_chunk_carries_the_role_and_no_token():
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    word = {"choices": [{"index": 0, "delta": {"content": "hi"}}]}
    response = Response("total")
    response.feed(1, HEAD)
    for time, one in ((2, role), (3, word), (4, word), (5, final(2))):
        payload = event(one)
        response.feed(time, b"%x\r\n%s\r\n" % (len(payload), payload))
    response.feed(6, b"0\r\n\r\n")
    assert response.tokens == [[3, 1], [4, 1]]


def test_a_reasoning_token_is_a_token():
    thought = {"choices": [{"index": 0, "delta": {"content": None, "reasoning_content": "hm"}}]}
    assert whole(HEAD + chunked(event(thought), event(final(1))), "total").tokens == [[1, 1]]


def test_text_that_looks_like_usage_is_not_counted():
    sly = completion('"completion_tokens":99', 1)
    assert whole(HEAD + chunked(event(sly), event(final(1))), "usage").tokens == [[1, 1]]


def test_where_only_the_total_is_told_it_is_spread_over_the_chunks():
    raw = HEAD + chunked(event(completion("ab")), event(completion("cd")), event(final(5)))
    assert whole(raw, "total").tokens == [[1, 3], [1, 2]]


@given(st.integers(1, 40), st.integers(1, 200))
def test_spreading_keeps_the_count_and_the_last_token_comes_with_the_last_chunk(chunks, count):
    times = list(range(chunks))
    parts = spread(times, count)
    assert sum(n for _, n in parts) == count and parts[-1][0] == times[-1]
    assert all(n > 0 for _, n in parts)


def test_tokens_that_no_chunk_told_of_come_with_the_last_chunk():
    raw = HEAD + chunked(event(completion("a", 1)), event(completion("b", 2)), event(final(4)))
    assert whole(raw, "usage").tokens == [[1, 1], [1, 3]]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        # a refusal with a body in OpenAI's form
        (b'HTTP/1.1 400 Bad\r\nContent-Length: 36\r\n\r\n{"error":{"message":"out of vocab"}}', "out of vocab"),
        # FastAPI's form
        (b'HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n{"detail":"Not Found"}', "HTTP 404: Not Found"),
        # an error in the middle of a stream that began well
        (HEAD + chunked(event(completion("a", 1)), event({"error": {"message": "engine died"}})), "engine died"),
        # in vLLM's older form
        (HEAD + chunked(event(completion("a", 1)), event({"object": "error", "message": "dead"})), "dead"),
        (HEAD + chunked(event(completion("a", 1)), event({"type": "error", "message": "dead"})), "dead"),
        # an answer that the engine gave up
        (
            HEAD + chunked(event(completion("a", 1)), event({"choices": [{"text": "", "finish_reason": "abort"}]})),
            "broke the answer off: finish_reason abort",
        ),
        # the server went away
        (HEAD + b"5\r\ndata", "response cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n", "response cut off"),
        (b"", "connection closed before the response"),
        # something else entirely
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n<html></html", "no event stream"),
        (HEAD + b"zz\r\nfoo\r\n", "bad chunk"),
        (HEAD + chunked(b"data: {nonsense\n\n"), "not JSON"),
        (HEAD + chunked(b'data: {"usage":{"completion_tokens":' + b"9" * 5_000 + b"}}\n\n"), "not JSON"),
        (HEAD + chunked(b"data: " + b"[" * 100_000 + b"\n\n"), "not JSON"),
        # ended properly, by the server or by what stands before it, and yet not all of an answer
        (HEAD + chunked(b"data: [DONE]\n\n"), "no token came"),
        (HEAD + chunked(event(completion("a", 1))), "response cut off"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + event(completion("a", 1)), "response cut off"),
    ],
)
def test_a_failure_is_told_in_words(raw, error):
    assert error in whole(raw, "usage").error


def test_a_body_without_framing_ends_with_its_connection():
    response = Response("usage")
    response.feed(1, b"HTTP/1.0 200 OK\r\n\r\n" + event(completion("a", 1)) + event(final(1)))
    assert not response.complete
    response.close()
    assert response.complete and not response.error and response.tokens == [[1, 1]]


def test_an_error_of_null_is_none():
    response = whole(HEAD + chunked(event({"error": None, **completion("a")}), b"data: [DONE]\n\n"), "total")
    assert not response.error and response.tokens == [[1, 1]]


def test_a_finish_reason_says_that_nothing_more_comes():
    last = {"choices": [{"text": "b", "finish_reason": "length"}]}
    assert not whole(HEAD + chunked(event(completion("a")), event(last)), "total").error


def test_many_interim_responses_are_passed_over():
    answer = HEAD + chunked(event(completion("a", 1)), event(final(1)))
    assert not whole(b"HTTP/1.1 103 x\r\n\r\n" * 3_000 + answer, "usage").error


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
keys = ("choices", "usage", "error", "text", "delta", "token_ids", "completion_tokens", "prompt_tokens")
events = st.recursive(
    anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=4),
)


@given(events)
@example({"choices": [None]})
@example({"choices": "text"})
@example({"choices": [{"token_ids": 3}]})
@example({"choices": [{"text": "a"}], "usage": {"completion_tokens": "5"}})
@example({"choices": [{"text": "a"}], "usage": {"completion_tokens": float("nan"), "prompt_tokens": -1}})
@example({"choices": [{"text": "a"}], "usage": {"completion_tokens": 10**12}})
def test_json_of_any_other_form_is_no_exception_and_no_number(data):
    for counting in ("usage", "ids", "total"):
        response = whole(HEAD + chunked(event(completion("a", 1, [7])), event(data), b"data: [DONE]\n\n"), counting)
        assert response.complete and sum(response.counts) < 10**7
        assert all(isinstance(n, int | None) for n in (response.output_tokens, response.prompt_tokens))


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-4\r\nab\r\n", [3])
@example(b"-6\r\nab\r\n", [])  # a negative size once went backwards for ever
def test_rubbish_is_an_error_never_an_exception(raw, cuts):
    for prefix in (b"", HEAD, HEAD + b"20\r\n", HEAD + b"5\r\ndata:"):
        response = Response("usage")
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 10**6], strict=True):
            response.feed(1, (prefix + raw)[a:b])
        response.close()
        assert response.complete or response.error


def test_a_running_count_is_no_end_and_the_totals_are_one():
    running, totals = event(completion("a", 1, [7])), event({"usage": {"completion_tokens": 1}})
    for counting in ("usage", "ids", "total"):
        assert whole(HEAD + chunked(running), counting).error == "response cut off"
        assert not whole(HEAD + chunked(running, event(final(1))), counting).error
    assert not whole(HEAD + chunked(running, totals), "ids").error


def test_a_prompt_of_more_tokens_than_there_are_is_not_counted():
    last = b'data: {"choices":[],"usage":{"prompt_tokens":' + b"9" * 5_000 + b',"completion_tokens":1}}\n\n'
    response = whole(HEAD + chunked(event(completion("a", 1)), last), "usage")
    assert not response.error and response.prompt_tokens is None


@pytest.mark.parametrize("framed", ["chunked", "length", "close"])
def test_a_stream_without_an_events_end_fails_after_a_megabyte(framed):
    heads = {"chunked": b"Transfer-Encoding: chunked\r\n", "length": b"Content-Length: 90000000\r\n", "close": b""}
    response, piece = Response("usage"), b"x" * 65_536
    response.feed(0, b"HTTP/1.1 200 OK\r\n" + heads[framed] + b"\r\n")
    for time in range(40):
        response.feed(time, b"10000\r\n" + piece + b"\r\n" if framed == "chunked" else piece)
        if time < 10:
            assert not response.error
    response.close()
    assert response.error == "over 1 MB without the end of an event"
    assert not response.complete and not response.tokens


def test_a_chunk_without_end_fails():
    response = Response("usage")
    response.feed(0, HEAD + b"7fffffff\r\n")
    for time in range(40):
        response.feed(time, b"x" * 1_000_000)
    assert response.error == "a chunk of over 16 MB in the response"
