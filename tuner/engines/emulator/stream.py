"""One request on its way through the emulator: what the client sees of it, token by token, in vLLM's JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuner.engines.emulator.http import STREAM_HEAD, Connection, chunk
from tuner.engines.emulator.quality import Answers
from tuner.engines.emulator.vocabulary import Vocabulary


@dataclass(slots=True, eq=False)
class Choice:
    """One prompt of a request and the tokens generated for it so far."""

    index: int
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    finished: str = ""


class Stream:
    """A completion or chat request being answered. ``max_tokens`` by choice are the scheduler's business; here tokens
    become text. ``usage_error`` is added to the reported completion tokens (a fault)."""

    def __init__(
        self,
        connection: Connection,
        body: Mapping[str, Any],
        choices: list[Choice],
        answers: Answers,
        vocabulary: Vocabulary,
        *,
        chat: bool,
        served: str,
        name: str,
        garbage: bool = False,
        usage_error: int = 0,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.connection, self.choices, self.answers, self.vocabulary = connection, choices, answers, vocabulary
        self.chat, self.garbage, self.usage_error, self.done = chat, garbage, usage_error, done
        self.served, self.name, self.created = served, name, int(time.time())
        self.streaming = bool(body.get("stream"))
        self.ids = bool(body.get("return_token_ids"))
        self.greedy = body.get("temperature") == 0
        self.logprobs = body.get("top_logprobs") if chat and body.get("logprobs") else body.get("logprobs")
        self.prompt_logprobs = body.get("prompt_logprobs")
        self.echo = bool(body.get("echo")) and not chat
        options = body.get("stream_options") or {}
        self.usage = bool(options.get("include_usage"))
        self.running_usage = bool(options.get("continuous_usage_stats"))
        self._salt = answers.context([*choices[0].prompt[-4:], len(choices[0].prompt)])
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._head = (
            f'data: {{"id":"{name}","object":"{kind}","created":{self.created},"model":{json.dumps(served)},"choices":['
        ).encode()
        self._left = len(choices)

    def open(self) -> None:
        """Sends the head of an event stream (and the chat's first chunk, which carries the role and no token)."""
        if not self.streaming:
            return
        self.connection.write(STREAM_HEAD)
        if self.chat:
            ids = _json(self.choices[0].prompt if self.ids else None)
            self.connection.write(
                chunk(
                    self._head + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
                    b'"finish_reason":null}],"prompt_token_ids":' + ids + b',"prompt_text":null}\n\n'
                )
            )

    def deliver(self, choice: Choice, count: int, finish: str) -> None:
        """``count`` more tokens of ``choice``; ``finish`` is ``length`` or ``stop`` with the last ones."""
        first = not choice.output
        tokens = self._next(choice, count)
        choice.finished = finish
        if finish:
            self._left -= 1
        if self.streaming:
            if self.garbage and not first:
                self.connection.write(chunk(b"data: {this is no JSON\xff\n\n"))
            else:
                self.connection.write(chunk(self._event(choice, tokens, first, finish)))
        if not self._left:
            self._close()

    def fail(self, message: str) -> None:
        """The engine died: an error inside the stream, or as the answer."""
        error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
        if self.streaming:
            self.connection.write(chunk(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n"))
            self.connection.end_stream()
        else:
            self.connection.reply(500, error)

    def _next(self, choice: Choice, count: int) -> list[int]:
        made = []
        for _ in range(count):
            if self.greedy:
                tail = choice.output[-4:]
                tokens = choice.prompt[-(4 - len(tail)) :] + tail if len(tail) < 4 else tail
                token = self.answers.greedy(self.answers.context(tokens))
            else:
                token = (self._salt + 2654435761 * len(choice.output)) % self.answers.vocab
            choice.output.append(token)
            made.append(token)
        return made

    def _event(self, choice: Choice, tokens: list[int], first: bool, finish: str) -> bytes:
        text = b"".join(map(self.vocabulary.piece, tokens))
        end = b'"%s"' % finish.encode() if finish else b"null"
        ids = b"[%s]" % b",".join(b"%d" % token for token in tokens) if self.ids else b"null"
        if self.chat:
            logprobs = _json(None if self.logprobs is None else self._chat_logprobs(choice, len(tokens)))
            body = b'{"index":%d,"delta":{"content":"%s"},"logprobs":%s,"finish_reason":%s' % (
                choice.index,
                text,
                logprobs,
                end,
            )
            body += (b',"stop_reason":null' if finish else b"") + (b',"token_ids":%s}' % ids if self.ids else b"}")
        else:
            logprobs = _json(None if self.logprobs is None else self._logprobs(choice, len(tokens)))
            prompt = b"null"
            if self.ids and first:
                prompt = _json(choice.prompt)
            body = (
                b'{"index":%d,"text":"%s","logprobs":%s,"finish_reason":%s,"stop_reason":null,"prompt_token_ids":%s,'
                b'"token_ids":%s}' % (choice.index, text, logprobs, end, prompt, ids)
            )
        usage = b""
        if self.running_usage:
            usage = b',"usage":' + _json(self._usage())
        return self._head + body + b"]" + usage + b"}\n\n"

    def _close(self) -> None:
        if self.streaming:
            if self.usage:
                usage = _json(self._usage())
                self.connection.write(chunk(self._head + b'],"usage":' + usage + b"}\n\n"))
            self.connection.write(chunk(b"data: [DONE]\n\n"))
            self.done()
            self.connection.end_stream()
        else:
            self.done()
            self.connection.reply(200, self._whole())

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(choice.prompt) for choice in self.choices)
        output = sum(len(choice.output) for choice in self.choices) + self.usage_error
        return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}

    def _whole(self) -> dict[str, Any]:
        head = {"id": self.name, "created": self.created, "model": self.served}
        choices = [self._choice(choice) for choice in self.choices]
        whole = {**head, "object": "chat.completion" if self.chat else "text_completion", "choices": choices}
        if self.chat:
            whole["prompt_logprobs"] = self._prompt_logprobs(self.choices[0])
            whole["prompt_token_ids"] = self.choices[0].prompt if self.ids else None
        return {**whole, "usage": self._usage()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = self.vocabulary.decode(choice.output)
        ids = choice.output if self.ids else None
        base = {"index": choice.index, "finish_reason": choice.finished, "stop_reason": None, "token_ids": ids}
        count = len(choice.output)
        if self.chat:
            logprobs = None if self.logprobs is None else self._chat_logprobs(choice, count)
            return {**base, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        if self.echo:
            text = self.vocabulary.decode(choice.prompt) + text
        return {
            **base,
            "text": text,
            "logprobs": None if self.logprobs is None else self._logprobs(choice, count),
            "prompt_logprobs": self._prompt_logprobs(choice),
            "prompt_token_ids": choice.prompt if self.ids else None,
        }

    def _prompt_logprobs(self, choice: Choice) -> list[dict[str, Any] | None] | None:
        """vLLM's form: per prompt token a mapping of token id to log-probability and rank, its own included."""
        wanted = self.prompt_logprobs
        if wanted is None:
            return None
        found: list[dict[str, Any] | None] = [None]
        for position in range(1, len(choice.prompt)):
            context = self.answers.context(choice.prompt, position)
            own, rank = self.answers.logprob(context, choice.prompt[position])
            entry = {str(choice.prompt[position]): self._entry(choice.prompt[position], own, rank)}
            for place, (token, value) in enumerate(self.answers.top(context, int(wanted)), 1):
                entry[str(token)] = self._entry(token, value, place)
            found.append(entry)
        return found

    def _entry(self, token: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": value, "rank": rank, "decoded_token": self.vocabulary.decode([token])}

    def _tops(self, choice: Choice, count: int, wanted: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """The last ``count`` tokens with their log-probability and the ``wanted`` likeliest instead of them."""
        tokens = choice.prompt[-4:] + choice.output
        found = []
        for position in range(len(tokens) - count, len(tokens)):
            context = self.answers.context(tokens, position)
            own, _ = self.answers.logprob(context, tokens[position])
            found.append((tokens[position], own, self.answers.top(context, wanted)))
        return found

    def _logprobs(self, choice: Choice, count: int) -> dict[str, Any]:
        rows = self._tops(choice, count, int(self.logprobs or 0))
        return {
            "text_offset": [0] * len(rows),
            "token_logprobs": [own for _, own, _ in rows],
            "tokens": [f"token_id:{token}" for token, _, _ in rows],
            "top_logprobs": [
                {f"token_id:{token}": own} | {f"token_id:{other}": value for other, value in tops}
                for token, own, tops in rows
            ],
        }

    def _chat_logprobs(self, choice: Choice, count: int) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            return {"token": f"token_id:{token}", "logprob": value, "bytes": None}

        return {
            "content": [
                {**entry(token, own), "top_logprobs": [entry(other, value) for other, value in tops]}
                for token, own, tops in self._tops(choice, count, int(self.logprobs or 0))
            ]
        }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
