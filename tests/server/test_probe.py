"""Asking a server who it is: whatever it answers, the question ends."""

import json
import socket
import threading
import time

import pytest

from tuner.server import probe


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_drips_for_ever_is_none(head):
    end = threading.Event()

    def drip(listener):
        link, _ = listener.accept()
        with link:
            link.sendall(head)
            while not end.wait(0.05) and time.monotonic() < began + 20:
                try:
                    link.sendall(b" ")
                except OSError:
                    return

    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        answer = probe.get(listener.getsockname()[1], "/health", timeout_s=0.5)
        end.set()
        thread.join()
    assert answer.status == 0 and time.monotonic() - began < 19  # and not what it is in 20 s


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{}", b"[1]", b'{"data": [7]}', b"no JSON"])
def test_an_answer_that_lists_no_models_is_none(body):
    assert probe.served_models(probe.Answer(200, body)) is None


def test_the_listed_names_are_read():
    assert probe.served_models(probe.Answer(200, json.dumps({"data": [{"id": "m"}]}).encode())) == ("m",)
