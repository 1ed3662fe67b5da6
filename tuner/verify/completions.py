"""A plain client of /v1/completions that asks for log-probabilities of the prompt (a vLLM extension)."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.engines.protocol import Endpoint
from tuner.load.wire import deadline, target

LISTED = 20  # vLLM gives at most so many per position unless it is started with --max-logprobs
LONGEST_PROMPT_TOKENS = 256
# the model's own distribution: what a request leaves out a server takes from the model's generation_config.json
UNALTERED = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Unanswered(Exception):
    """The server did not give what was asked for; the message says what."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every token but the first: its own log-probability, and those of the most probable ones at its place (token id
    to log-probability)."""

    tokens: tuple[float, ...]
    tops: tuple[Mapping[int, float], ...]

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        return all(map(math.isfinite, (*self.tokens, *(value for top in self.tops for value in top.values()))))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        return cls(tuple(data["tokens"]), tuple({int(k): v for k, v in top.items()} for top in data["tops"]))


def _number(logprob: Any) -> float:
    return math.nan if logprob is None else float(logprob)  # JSON has no NaN: some servers write null


class Completions:
    """Requests one after the other: the server is to compare, not to be loaded. ``unaltered``: of the model's own
    distribution, whatever its generation_config.json says. An answer, whole, may take ``timeout_s``."""

    def __init__(self, endpoint: Endpoint, timeout_s: float, *, unaltered: bool = True) -> None:
        self._endpoint, self._timeout_s = endpoint, timeout_s
        self._sampling = UNALTERED if unaltered else {}

    def draw(self, text: str, count: int, *, seed: int) -> tuple[tuple[int, ...], int]:
        """The tokens of ``text`` (cut to 256) and ``count`` more drawn at temperature 1; how many were given."""
        tokens = self._choice(prompt=text, max_tokens=1, seed=seed).get("prompt_token_ids")
        if not tokens:
            raise Unanswered("the server does not return token ids (return_token_ids)")
        prompt = list(tokens)[:LONGEST_PROMPT_TOKENS]
        answer = self._choice(prompt=prompt, max_tokens=count, temperature=1.0, seed=seed)
        return (*prompt, *answer.get("token_ids", ())), len(prompt)

    def greedy(self, prompt: Sequence[int], count: int, *, seed: int = 0) -> tuple[int, ...]:
        """``count`` most probable tokens, one after the other."""
        answer = self._choice(prompt=list(prompt), max_tokens=count, temperature=0.0, seed=seed)
        return tuple(answer.get("token_ids", ()))

    def score(self, tokens: Sequence[int]) -> Scores:
        """Log-probabilities of ``tokens`` as a prompt."""
        answer = self._choice(prompt=list(tokens), max_tokens=1, temperature=0.0, prompt_logprobs=LISTED)
        places = answer.get("prompt_logprobs")
        if not places or len(places) != len(tokens):
            raise Unanswered("the server gives no prompt log-probabilities (prompt_logprobs)")
        try:
            lists = [{int(token): entry for token, entry in place.items()} for place in places[1:]]
            own = tuple(_number(found[token]["logprob"]) for found, token in zip(lists, tokens[1:], strict=True))
            # besides the most probable ones a list holds the prompt's own token: a choice of ours, not of the model
            tops = tuple(
                {token: _number(e["logprob"]) for token, e in found.items() if (e.get("rank") or 1) <= LISTED}
                for found in lists
            )
        except (KeyError, TypeError, ValueError, AttributeError) as failure:
            raise Unanswered(f"the server's prompt log-probabilities are of another shape: {failure!r}") from failure
        return Scores(own, tops)

    def _choice(self, **body: Any) -> dict[str, Any]:
        """The first choice of one completion; its ids even where the answer would have ended."""
        wanted = {"model": self._endpoint.model, "ignore_eos": True, "return_token_ids": True, "stream": False}
        wanted |= self._sampling | body
        headers = {"Content-Type": "application/json"}
        if self._endpoint.api_key:
            headers["Authorization"] = f"Bearer {self._endpoint.api_key}"
        try:
            status, answer = self._answer(json.dumps(wanted).encode(), headers)
        except TimeoutError:
            raise Unanswered(f"no whole answer came within {self._timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as failure:
            raise Unanswered(f"{type(failure).__name__}: {failure}") from failure
        if status != 200:
            raise Unanswered(f"HTTP {status}: {answer[:300].decode(errors='replace')}")
        try:
            return json.loads(answer)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError) as failure:
            what = "a completion that is not streamed is answered with something else than JSON with choices"
            raise Unanswered(f"{what} ({type(failure).__name__}: {failure})") from failure

    def _answer(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        where = target(self._endpoint.url)
        connection = where.connection(self._timeout_s)
        try:
            with deadline(connection, self._timeout_s):
                connection.request("POST", f"{where.path}/v1/completions", body, headers)
                response = connection.getresponse()
                return response.status, response.read()
        finally:
            connection.close()
