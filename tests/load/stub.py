"""A streaming OpenAI-compatible server with known timing, in a process of its own: what the client tests measure.

Run as a script it takes one JSON argument (see ``DEFAULTS``), prints its port and serves until killed. Tokens of a
request leave at ``release(arrival) + first_s + k * gap_s``, where ``release`` moves a time within a stall to its end;
on a busy machine they leave later, and ``times`` has when they did.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager

DEFAULTS = {
    "first_s": 0.05,
    "gap_s": 0.02,
    "tokens_per_chunk": 1,  # an engine step that makes several tokens
    "stall_every_s": 0.0,
    "stall_s": 0.0,  # the last stall_s of every stall_every_s
    "epoch_s": 0.0,  # monotonic time from which stalls are counted
    "glue": 1,  # events per write
    "split": 0,  # bytes per write, 0: whole
    "usage": "continuous",  # or "final" or "none"
    "refuse": [],  # request fields that are answered with 400
    "chat_only": False,
    "fail_every": 0,  # every k-th request gets HTTP 503
    "break_every": 0,  # every k-th request breaks off in mid-stream
    "cut_every": 0,  # every k-th answer ends early and in due form, as when a proxy took a death for the end
    "hang_every": 0,  # every k-th request is never answered
    "done": True,  # whether streams end with [DONE]
    "end": "0\r\n\r\n",  # of a chunked body
    "pings": False,  # comments for ever instead of an answer
    "idle_close_s": 0.0,  # closes a connection this long after a response
    "close_on_reuse": False,  # takes a connection's second request and hangs up, as when closing it as idle
    "max_output": 0,  # stops by itself, as a model does at its end of sequence
    "template": -1,  # tokens that it adds to a prompt of text, whose words it counts (-1: it guesses)
    "reads": 0,  # tokens of a prompt that it reads, 0: all
    "tls": [],  # certificate and key
    "html": False,  # answers with a web page
    "times": "",  # file that gets one JSON line per answer: when each of its tokens left, monotonic
    "log": "",  # file that gets one JSON line per request: number of prompt tokens, what was asked
}


class Server:
    def __init__(self, config: dict) -> None:
        self.c = {**DEFAULTS, **config}
        self.count = 0
        self.made = 0
        self.log = open(self.c["log"], "a", buffering=1) if self.c["log"] else None  # noqa: SIM115
        self.times = open(self.c["times"], "a", buffering=1) if self.c["times"] else None  # noqa: SIM115

    def release(self, t: float) -> float:
        every, stall = self.c["stall_every_s"], self.c["stall_s"]
        if not every or t < self.c["epoch_s"]:
            return t
        phase = (t - self.c["epoch_s"]) % every
        return t + every - phase if phase >= every - stall else t

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            limit_s, answered = None, False
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), limit_s)
                arrival = time.monotonic()
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                length = next((int(x.split(":")[1]) for x in lines if x.lower().startswith("content-length")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                if answered and self.c["close_on_reuse"]:
                    break
                answered = method == "POST"
                if not await self.answer(method, path, body, arrival, writer):
                    break
                limit_s = self.c["idle_close_s"] or None
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: dict, arrival: float, writer: asyncio.StreamWriter) -> bool:
        c = self.c
        if c["html"]:
            return self.plain(writer, 200, b"<html>hello</html>", "text/html")
        if path == "/v1/models":
            return self.plain(writer, 200, b'{"data":[{"id":"stub"}]}')
        if path == "/made":  # how many tokens left for the clients
            return self.plain(writer, 200, str(self.made).encode())
        chat = path == "/v1/chat/completions"
        if method != "POST" or not (chat or (path == "/v1/completions" and not c["chat_only"])):
            return self.plain(writer, 404, b'{"detail":"Not Found"}')
        for field in c["refuse"]:
            asked = body | body.get("stream_options", {})
            if field in asked or (field == "ids" and isinstance(body.get("prompt"), list)):
                return self.plain(writer, 400, json.dumps({"error": {"message": f"no {field}"}}).encode())
        prompt = body.get("prompt", body.get("messages"))
        if self.log:
            self.log.write(json.dumps({"prompt": prompt, "body": {k: body[k] for k in body if k != "prompt"}}) + "\n")
        asked_tokens = body.get("max_tokens") or body["max_completion_tokens"]
        probing = asked_tokens == 8  # the client's own first question is always answered well
        self.count += not probing
        k = self.count
        if not probing and c["fail_every"] and k % c["fail_every"] == 0:
            return self.plain(writer, 503, b'{"error":{"message":"overloaded"}}')
        if not probing and c["hang_every"] and k % c["hang_every"] == 0:
            await asyncio.sleep(3600)
        n = min(asked_tokens, c["max_output"] or asked_tokens)
        start = self.release(arrival) + (0 if probing else c["first_s"])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if chat:
            self.event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        while c["pings"]:
            self.chunk(writer, b": ping\n\n")
            await writer.drain()
            await asyncio.sleep(0.05)
        made, pending, left_s = 0, [], []
        step = 0
        while made < n:
            due = self.release(start + step * (0 if probing else c["gap_s"]))
            step += 1
            delay = due - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            if writer.transport.is_closing():
                return False  # the client hung up
            new = min(c["tokens_per_chunk"], n - made)
            made += new
            self.made += new
            left_s += [time.monotonic()] * new
            choice = {"index": 0, "text": "x" * new} if not chat else {"index": 0, "delta": {"content": "x" * new}}
            if body.get("return_token_ids"):
                choice["token_ids"] = [7] * new
            event: dict = {"choices": [choice]}
            if c["usage"] == "continuous" and body.get("stream_options", {}).get("continuous_usage_stats"):
                event["usage"] = self.usage(prompt, made)
            pending.append(event)
            if len(pending) >= c["glue"] or made >= n:
                self.events(writer, pending)
                pending = []
            if not probing and c["break_every"] and k % c["break_every"] == 0 and made > n // 2:
                return False
            if not probing and c["cut_every"] and k % c["cut_every"] == 0 and made > n // 2:
                writer.write(c["end"].encode())
                return True
        if self.times and not probing:
            self.times.write(json.dumps(left_s) + "\n")
        if c["usage"] != "none":
            self.event(writer, {"choices": [], "usage": self.usage(prompt, made)})
        if c["done"]:
            self.chunk(writer, b"data: [DONE]\n\n")
        writer.write(c["end"].encode())
        return True

    def usage(self, prompt: object, made: int) -> dict:
        chat = isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
        text = prompt[-1]["content"] if chat else prompt
        tokens = len(text) if isinstance(text, list) else len(str(prompt)) // 4 + 1
        if self.c["template"] >= 0 and isinstance(text, str):
            tokens = len(text.split()) + self.c["template"]
        tokens = min(tokens, self.c["reads"] or tokens)
        return {"prompt_tokens": tokens, "completion_tokens": made, "total_tokens": tokens + made}

    def event(self, writer: asyncio.StreamWriter, data: dict) -> None:
        self.events(writer, [data])

    def events(self, writer: asyncio.StreamWriter, events: list[dict]) -> None:
        self.chunk(writer, b"".join(b"data: %s\n\n" % json.dumps(e, separators=(",", ":")).encode() for e in events))

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        data = b"%x\r\n%s\r\n" % (len(data), data)
        size = self.c["split"] or len(data)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])

    def plain(self, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json") -> bool:
        writer.write(
            b"HTTP/1.1 %d x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind.encode(), len(body))
        )
        writer.write(body)
        return True


@contextmanager
def stub(**config: object):
    """The server's process and URL: ``with stub(first_s=0.1) as (process, url)``."""
    with subprocess.Popen([sys.executable, __file__, json.dumps(config)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def main() -> None:
    config = json.loads(sys.argv[1])
    context = None
    if config.get("tls"):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*config["tls"])
    server = await asyncio.start_server(Server(config).serve, "127.0.0.1", 0, backlog=2048, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
