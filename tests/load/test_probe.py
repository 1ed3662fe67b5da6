"""What a server is asked before a replay, and what is said of one that answers otherwise."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tuner.engines.protocol import Endpoint
from tuner.errors import EnvironmentFault, UsageError
from tuner.load.probe import probe

MODELS = json.dumps({"data": [{"id": "m"}]})


@contextmanager
def server(models=(200, MODELS), complete=lambda body: (200, "")):
    """Answers ``/v1/models`` with ``models``, completions with what ``complete`` makes of them; yields its URL and the
    requests it saw as (path, key, body)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body=None):
            seen.append((self.path, self.headers.get("Authorization"), body))
            status, text = models if body is None else complete(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            self._answer()

        def do_POST(self):
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", seen
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def stream(*counts, total=None):
    """One event with a text and a token id for each running count (None: it tells none), the total, the end."""
    events = []
    for number, count in enumerate(counts):
        choice = {"index": 0, "text": "a", "delta": {"content": "a"}, "token_ids": [number]}
        events.append({"choices": [choice]} | ({} if count is None else {"usage": {"completion_tokens": count}}))
    if total is not None:
        events.append({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": total}})
    return 200, "".join(f"data: {event}\n\n" for event in (*map(json.dumps, events), "[DONE]"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_called_so_wherever_it_is_refused(status):
    no = (status, '{"error": {"message": "bad key"}}')
    for where in ({"models": no}, {"complete": lambda body: no}):
        with server(**where) as (url, _), pytest.raises(UsageError, match=r"refuses the key: .*bad key") as refused:
            probe(Endpoint(url, "", "k"))
        assert "--api-key, or OPENAI_API_KEY (of an attached server engine.options.api_key_env)" in refused.value.fix


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_or_still_loads_is_not_serving(status):
    no = (status, '{"error": {"message": "loading"}}')
    for where in ({"models": no}, {"complete": lambda body: no}):
        with server(**where) as (url, _), pytest.raises(EnvironmentFault, match=r"is not serving: .*loading"):
            probe(Endpoint(url, ""))


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, "<html>"),
        (200, "<html>"),
        (200, "[" * 100_000),
        (200, '{"data": 7}'),
        (200, '{"data": [{}]}'),
        (200, '{"data": [{"id": null}]}'),
    ],
)
def test_what_is_no_list_of_models_is_no_such_server(status, text):
    with server((status, text)) as (url, _), pytest.raises(UsageError, match="is no OpenAI-compatible server"):
        probe(Endpoint(url, ""))


def test_a_server_that_lists_no_model_is_not_said_to_be_another_kind_of_server():
    with server((200, '{"data": []}')) as (url, _), pytest.raises(UsageError, match="lists no model") as refused:
        probe(Endpoint(url, ""))
    assert "--model" in refused.value.fix


def test_the_key_is_sent_with_the_first_question_too():
    with server(complete=lambda body: stream(1, 2, total=2)) as (url, seen):
        found = probe(Endpoint(url, "", "secret"))
    assert found.dialect.model == "m"
    assert {key for _, key, _ in seen} == {"Bearer secret"}
    assert [path for path, *_ in seen] == ["/v1/models", "/v1/completions"]


def test_a_running_count_must_come_to_the_whole_and_in_more_than_one_event():
    for answer, way in ((stream(1, 2, total=2), "usage"), (stream(1, 3, total=2), "ids"), (stream(1, total=1), "ids")):
        with server(complete=lambda _, answer=answer: answer) as (url, _):
            assert probe(Endpoint(url, "m")).dialect.counting == way


def test_token_ids_count_where_no_total_says_otherwise():
    for answer, way in (
        (stream(None, None), "ids"),
        (stream(None, None, total=2), "ids"),
        (stream(None, None, total=3), "total"),
    ):
        with server(complete=lambda _, answer=answer: answer) as (url, _):
            assert probe(Endpoint(url, "m")).dialect.counting == way


def test_chunks_without_ids_are_not_ids_and_what_tells_no_number_is_said_to_tell_none():
    def plain(total):
        events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "length"}]}]
        usage = [{"choices": [], "usage": {"completion_tokens": total}}] if total else []
        return 200, "".join(f"data: {event}\n\n" for event in (*map(json.dumps, events + usage), "[DONE]"))

    for total, way, words in ((2, "total", "tells only the total"), (None, "chunks", "tells no number of tokens")):
        with server(complete=lambda _, total=total: plain(total)) as (url, _):
            found = probe(Endpoint(url, "m"))
        assert found.dialect.counting == way and words in found.notes[0]


def test_a_chat_server_that_knows_the_new_name_of_the_token_limit_alone_is_asked_by_it():
    def complete(body):
        return stream(1, 2, total=2) if "max_completion_tokens" in body and "messages" in body else (400, "{}")

    with server(complete=complete) as (url, _):
        found = probe(Endpoint(url, "m")).dialect
    assert (found.route, found.max_tokens_name) == ("chat", "max_completion_tokens")
