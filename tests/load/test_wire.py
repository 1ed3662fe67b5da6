"""Requests as bytes: every prompt and every output length its own."""

import json

import pytest

from tuner.errors import UsageError
from tuner.load.wire import Dialect, Writer, get, post, target


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_requests_that_follow_each_other_ask_for_their_own_lengths_and_prompts(route):
    writer = Writer(target("http://127.0.0.1:8000"), Dialect("m", route), sampling={"temperature": 0})
    for prompt, length in (("a", 7), ("b", 9), ("c", 7)):
        head, _, body = writer.request(prompt, length).partition(b"\r\n\r\n")
        asked = json.loads(body)
        assert asked["max_tokens"] == asked["min_tokens"] == length and asked["temperature"] == 0
        assert (asked["messages"][0]["content"] if route == "chat" else asked["prompt"]) == prompt
        assert f"content-length: {len(body)}" in head.decode().lower()


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("http://10.0.0.7:8000", "10.0.0.7:8000", ""),
        ("10.0.0.7:8000/v1/", "10.0.0.7:8000", ""),
        ("http://h/prefix/v1", "h", "/prefix"),
        ("http://h:80", "h", ""),  # the scheme's own port is not named
        ("http://h:443", "h:443", ""),
        ("https://h:443", "h", ""),
        ("https://h:80", "h:80", ""),
        ("http://[::1]:8000", "[::1]:8000", ""),
        ("http://bücher.de", "xn--bcher-kva.de", ""),
    ],
)
def test_a_request_names_the_host_and_keeps_what_stands_before_v1(url, host, path):
    where = target(url)
    asked = Writer(where, Dialect("m")).request([1], 1).decode()
    assert asked.startswith(f"POST {path}/v1/completions HTTP/1.1\r\n")
    assert f"\r\nHost: {host}\r\n" in asked
    asked = get(where, "/v1/models").decode()
    assert asked.startswith(f"GET {path}/v1/models HTTP/1.1\r\nHost: {host}\r\n")


def test_a_key_is_sent_where_there_is_one():
    where = target("http://h")
    for asked in (post(where, "/", b"", "k"), get(where, "/", "k"), Writer(where, Dialect("m"), "k").request([1], 1)):
        assert b"\r\nAuthorization: Bearer k\r\n" in asked
    assert b"Authorization" not in post(where, "/", b"") + get(where, "/")


@pytest.mark.parametrize(
    "url",
    [
        "http://ä..b:9700",
        f"http://{'a' * 70}:9700",
        "http://a b:9700",
        "http://h:0",
        "http://h:99999",
        "http://h/a b",
        "http://h/ä",
        "http://h?q",
        "ftp://h",
        "http://",
        "http://[zz]:80",
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UsageError, match="bad URL"):
        target(url)


def test_a_url_with_a_password_is_refused_without_showing_it():
    with pytest.raises(UsageError, match="it names a user") as refused:
        target("http://me:secret@h:8000")
    assert "secret" not in str(refused.value)
    assert "--api-key" in refused.value.fix and "engine.options.api_key_env" in refused.value.fix
