"""A small language model with known log-probabilities, behind /v1/completions as vLLM answers it.

The next token depends on the last one (a bigram table of logits), so the divergence between a model and its damaged
copy can be computed exactly. ``damage`` is the standard deviation of what is added to every logit.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from tuner.engines.protocol import Endpoint


@dataclass(frozen=True, slots=True, eq=False)
class Language:
    """``logprobs`` (V, V): row = last token. ``prompt_logprobs`` False: a server without that extension. ``top_k`` is
    what its generation_config.json says: for requests that do not."""

    logprobs: np.ndarray
    prompt_logprobs: bool = True
    top_k: int = -1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """One choice, in vLLM's form."""
        vocabulary = len(self.logprobs)
        prompt = body["prompt"]
        tokens = [ord(c) % vocabulary for c in prompt] if isinstance(prompt, str) else list(prompt)
        rng = np.random.default_rng([body.get("seed", 0), len(tokens)])
        made: list[int] = []
        for _ in range(body["max_tokens"]):
            row = self.logprobs[(tokens + made)[-1]]
            greedy = body.get("temperature", 1.0) == 0
            top_k = body.get("top_k", self.top_k)
            kept = np.argsort(-row)[: top_k if top_k > 0 else None]
            p = np.exp(row) * np.isin(np.arange(vocabulary), kept)
            made.append(int(np.argmax(row)) if greedy else int(rng.choice(vocabulary, p=p / p.sum())))
        choice: dict[str, Any] = {"text": "", "token_ids": made, "prompt_token_ids": tokens}
        if self.prompt_logprobs and body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None, *self._places(tokens, body["prompt_logprobs"])]
        return {"choices": [choice]}

    def _places(self, tokens: list[int], listed: int) -> list[dict[str, dict[str, Any]]]:
        return [self._place(last, token, listed) for last, token in itertools.pairwise(tokens)]

    def _place(self, last: int, token: int, listed: int) -> dict[str, dict[str, Any]]:
        row = self.logprobs[last]
        rank = np.empty(len(row), dtype=int)
        rank[np.argsort(-row)] = np.arange(1, len(row) + 1)
        chosen = {*np.argsort(-row)[:listed].tolist(), token}
        return {str(t): {"logprob": float(row[t]), "rank": int(rank[t]), "decoded_token": ""} for t in chosen}


def language(damage: float, *, vocabulary: int = 400, sharpness: float = 3.0, seed: int = 0, **more: Any) -> Language:
    """The model of ``seed``, each logit off by a normal error of ``damage``."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (vocabulary, vocabulary))
    logits = logits + np.random.default_rng(seed + 1).normal(0, 1, logits.shape) * damage
    return Language(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), **more)


def divergence(first: Language, second: Language, tokens: list[int]) -> float:
    """The exact KL divergence in nats per token, in the mean over the places after ``tokens``."""
    p, q = first.logprobs[tokens], second.logprobs[tokens]
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@contextmanager
def serve(model: Language) -> Iterator[Endpoint]:
    """``model`` on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(model.answer(body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}", "bigram")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
