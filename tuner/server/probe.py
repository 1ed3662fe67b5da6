"""Asking a server on 127.0.0.1 who it is, with the standard library: one short request at a time."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass

from tuner.load.wire import deadline


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0: nobody answered HTTP; ``body`` is cut after 1 MiB."""

    status: int
    body: bytes = b""


def get(port: int, path: str, api_key: str = "", timeout_s: float = 2.0) -> Answer:
    """One GET; never raises. ``timeout_s`` bounds all of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with deadline(connection, timeout_s):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, response.read(2**20))
    except (OSError, http.client.HTTPException):
        return Answer(0)
    finally:
        connection.close()


def listens(port: int) -> bool:
    """Whether somebody accepts connections on the port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.connect()
    except OSError:
        return False
    finally:
        connection.close()
    return True


def served_models(answer: Answer) -> tuple[str, ...] | None:
    """The model names of a ``/v1/models`` answer; None where it is not one."""
    try:
        data = json.loads(answer.body)["data"]
        return tuple(str(entry["id"]) for entry in data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
