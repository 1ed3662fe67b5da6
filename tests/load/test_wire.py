"""Requests as bytes: every prompt and every output length its own."""

import json

import pytest

from tuner.load.wire import Dialect, Writer, target


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_requests_that_follow_each_other_ask_for_their_own_lengths_and_prompts(route):
    writer = Writer(target("http://127.0.0.1:8000"), Dialect("m", route), sampling={"temperature": 0})
    for prompt, length in (("a", 7), ("b", 9), ("c", 7)):
        head, _, body = writer.request(prompt, length).partition(b"\r\n\r\n")
        asked = json.loads(body)
        assert asked["max_tokens"] == asked["min_tokens"] == length and asked["temperature"] == 0
        assert (asked["messages"][0]["content"] if route == "chat" else asked["prompt"]) == prompt
        assert f"content-length: {len(body)}" in head.decode().lower()
