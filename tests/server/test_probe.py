"""Asking a server who it is: whatever it answers, the question ends."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from tuner.errors import Unreachable
from tuner.load.probe import asked
from tuner.load.wire import target
from tuner.server import probe

HEADS = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "]


@contextmanager
def dripping(head):
    """A server that sends ``head`` and then a blank now and then, for 20 s; yields its port."""
    end, began = threading.Event(), time.monotonic()

    def drip(listener):
        link, _ = listener.accept()
        with link:
            link.sendall(head)
            while not end.wait(0.05) and time.monotonic() < began + 20:
                try:
                    link.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            end.set()
            thread.join()
    assert time.monotonic() - began < 19  # and not what it is in 20 s


@pytest.mark.parametrize("head", HEADS)
def test_an_answer_that_drips_for_ever_is_none(head):
    with dripping(head) as port:
        assert probe.get(port, "/health", timeout_s=0.5).status == 0


@pytest.mark.parametrize("head", HEADS)
def test_another_machines_server_that_drips_for_ever_did_not_answer_in_time(head):
    with dripping(head) as port, pytest.raises(Unreachable, match="did not answer in time"):
        asked(target(f"http://127.0.0.1:{port}"), "/v1/models", "", 0.5)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{}", b"[1]", b'{"data": [7]}', b"no JSON"])
def test_an_answer_that_lists_no_models_is_none(body):
    assert probe.served_models(probe.Answer(200, body)) is None


def test_the_listed_names_are_read():
    assert probe.served_models(probe.Answer(200, json.dumps({"data": [{"id": "m"}]}).encode())) == ("m",)
