"""The emulator's endpoints: vLLM's paths, answers and refusals, in front of the simulation and the wall clock."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.engines.emulator.clock import Alarm, Lateness
from tuner.engines.emulator.console import VERSION, Console
from tuner.engines.emulator.faults import Faults
from tuner.engines.emulator.http import Connection, Request
from tuner.engines.emulator.prometheus import exposition
from tuner.engines.emulator.quality import Answers
from tuner.engines.emulator.scheduler import Job
from tuner.engines.emulator.simulator import OutOfMemoryUnderLoad, Simulator, Work
from tuner.engines.emulator.stream import Choice, Stream
from tuner.engines.emulator.vocabulary import Vocabulary

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(frozen=True, slots=True)
class Identity:
    """Under which name and key the server answers, and the model folder it stands for."""

    served: str
    api_key: str
    model: str


class BadRequest(ValueError):
    """A request that vLLM would refuse with 400; ``param`` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Service:
    """Answers requests. ``scale`` is how many emulated seconds pass per second of the wall clock; ``stop(code)`` ends
    the process; ``unlisten()`` closes the listening socket (a fault)."""

    def __init__(
        self,
        simulator: Simulator,
        answers: Answers,
        identity: Identity,
        console: Console,
        faults: Faults,
        scale: float,
        stop: Callable[[int], None],
        unlisten: Callable[[], None] = lambda: None,
    ) -> None:
        self.simulator, self.answers, self.identity, self.console = simulator, answers, identity, console
        self.faults, self.scale, self.stop, self.unlisten = faults, scale, stop, unlisten
        self.vocabulary = Vocabulary(identity.model, simulator.shape.vocab)
        self.lateness = Lateness()
        self.alarm: Alarm | None = None
        self.streams: dict[int, tuple[Stream, Choice, int]] = {}
        self.started_s = time.monotonic()
        self.requests = self.generated = 0
        self.dead = self.frozen = False
        self.stalled = False
        self.latencies: dict[str, list[float]] = {"ttft": [], "e2e": []}
        self._rng = random.Random(f"faults-{simulator.seed}")

    def now_s(self) -> float:
        """The simulation's clock."""
        return (time.monotonic() - self.started_s) * self.scale

    # -- the clock ---------------------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Handles everything that is due and sets the alarm for what comes next."""
        if self.dead or self.frozen:
            return
        try:
            while (due := self.simulator.next_event_s) <= self.now_s():
                for delivery in self.simulator.advance():
                    self._deliver(delivery.job, delivery.count, delivery.last)
                    if self.dead or self.frozen:
                        return
                    self.lateness.add(self.now_s() / self.scale - due / self.scale)
        except OutOfMemoryUnderLoad as error:
            self._die(f"torch.OutOfMemoryError: {error}")
            return
        if self.alarm and due < float("inf"):
            self.alarm.set(self.started_s + due / self.scale)

    def _deliver(self, job: Job, count: int, last: bool) -> None:
        entry = self.streams.get(job.id)
        if entry is None:
            return
        stream, choice, wanted = entry
        self.generated += count
        if self._fault_under_load():
            return
        finish = ("length" if job.output >= wanted else "stop") if last else ""
        if last:
            del self.streams[job.id]
        stream.deliver(choice, count, finish)

    def _fault_under_load(self) -> bool:
        """Whether a fault that waits for tokens strikes now."""
        if not self.faults.args:
            return False

        def due(name: str) -> bool:
            after = self.faults.number(name, 50)
            return after is not None and self.generated >= after

        if due("segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if due("killed-load"):
            os.kill(os.getpid(), signal.SIGKILL)
        if due("silent-death-load"):
            self.dead = True
            self.stop(-1)
        elif due("crash"):
            self._die("RuntimeError: Worker failed with error 'the emulator was asked to crash'")
        elif due("cuda-error"):
            self._die(
                "torch.AcceleratorError: CUDA error: an illegal memory access was encountered\nCUDA kernel errors "
                "might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
            )
        elif due("oom-load"):
            self._die(
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.94 GiB. GPU 0 has a total capacity of "
                "79.18 GiB of which 1.12 GiB is free."
            )
        elif due("hang-load"):
            self.frozen = True
        stall = self.faults.number("stall", 1.0)
        if stall is not None and not self.stalled and self.generated >= (self.faults.number("stall", 50, 1) or 0):
            self.stalled = True
            time.sleep(stall)
            self.started_s += stall  # the emulated engine stood still: it is not the emulator that is late
        return self.dead or self.frozen

    def _die(self, error: str) -> None:
        """The engine core dies: vLLM's last words, errors to every client, and the API server goes down."""
        self.dead = True
        self.console.engine_died(error)
        for stream in {id(s): s for s, _, _ in self.streams.values()}.values():
            stream.fail(DEAD)
        self.streams.clear()
        self.stop(0)

    # -- requests ----------------------------------------------------------------------------------------------------

    def handle(self, request: Request, connection: Connection) -> None:
        """Answers one HTTP request; never raises for what the client sent."""
        path = request.path
        if path.startswith("/v1") and not self._allowed(request):
            connection.reply(401, {"error": "Unauthorized"})
            return
        try:
            self._route(path, request, connection)
        except BadRequest as error:
            body = {"message": str(error), "type": "BadRequestError", "param": error.param, "code": 400}
            connection.reply(400, {"error": body})
        except (ValueError, TypeError, KeyError) as error:
            body = {"message": f"1 validation error:\n  {error}", "type": "Bad Request", "param": "body", "code": 400}
            connection.reply(400, {"error": body})

    def _allowed(self, request: Request) -> bool:
        if "wrong-key" in self.faults:
            return False
        key = self.identity.api_key
        return not key or request.headers.get("authorization") == f"Bearer {key}"

    def _route(self, path: str, request: Request, connection: Connection) -> None:
        if path in ("/health", "/ping"):
            connection.reply(503 if self._unhealthy() else 200)
        elif path == "/version":
            connection.reply(200, {"version": VERSION})
        elif path == "/metrics":
            connection.reply(200, exposition(self).encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path in ("/emulator", "/emulator/reset"):
            connection.reply(200, self.state())
            if path.endswith("reset"):
                self.lateness = Lateness()
        elif path == "/v1/models":
            card = {
                "id": self.served,
                "object": "model",
                "owned_by": "vllm",
                "root": self.identity.model,
                "parent": None,
            }
            card["max_model_len"] = self.simulator.settings.max_model_len  # type: ignore[assignment]
            connection.reply(200, {"object": "list", "data": [card]})
        elif path == "/tokenize" and request.method == "POST":
            body = json.loads(request.body)
            tokens = self._prompts(body)[0]
            length = self.simulator.settings.max_model_len
            connection.reply(200, {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": None})
        elif path == "/detokenize" and request.method == "POST":
            connection.reply(200, {"prompt": self.vocabulary.decode(json.loads(request.body)["tokens"])})
        elif path in ("/v1/completions", "/v1/chat/completions") and request.method == "POST":
            self._generate(json.loads(request.body), connection, path.startswith("/v1/chat"))
        else:
            connection.reply(404, {"detail": "Not Found"})

    @property
    def served(self) -> str:
        return "somebody-elses-model" if "wrong-model" in self.faults else self.identity.served

    def _unhealthy(self) -> bool:
        slow = self.faults.number("slow-health", 2.0)
        limit = self.faults.number("unhealthy", 3)
        return (
            self.dead
            or (slow is not None and time.monotonic() - self.started_s < slow)
            or (limit is not None and self.requests > limit)
        )

    def _prompts(self, body: Mapping[str, Any]) -> list[list[int]]:
        """The prompts of a completion or chat request as token ids."""
        if "messages" in body:
            parts = [f"<|im_start|>{m.get('role', '')}\n{m.get('content') or ''}<|im_end|>\n" for m in body["messages"]]
            return [self.vocabulary.encode("".join(parts) + "<|im_start|>assistant\n")]
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return [self.vocabulary.encode(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return [self.vocabulary.encode(one) if isinstance(one, str) else one for one in prompt]

    def _generate(self, body: Mapping[str, Any], connection: Connection, chat: bool) -> None:
        asked = body.get("model") or self.served
        if asked != self.served:
            message = f"The model `{asked}` does not exist. Valid aliases: {self.served}."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            connection.reply(404, {"error": error})
            return
        self.requests += 1
        share = self.faults.number("http-500", 0.2)
        limit = self.faults.number("unhealthy", 3)
        allowed = self.faults.number("refuse", 3)
        if allowed is not None and self.requests > allowed:
            self.unlisten()
            connection.reset()  # whoever is still connected
            return
        unlucky = share is not None and self.requests > 2 and self._rng.random() < share  # a client's probes are spared
        if unlucky or (limit is not None and self.requests > limit):
            error = {"message": "Internal Server Error", "type": "InternalServerError", "param": None, "code": 500}
            connection.reply(500, {"error": error})
            return
        prompts = self._prompts(body)
        if not prompts or not all(prompts):
            raise BadRequest("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        outputs = [self._output_tokens(body, prompt, chat) for prompt in prompts]
        name = f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(64):016x}"
        choices = [Choice(index, prompt) for index, prompt in enumerate(prompts)]
        stream = Stream(
            connection,
            body,
            choices,
            self.answers,
            self.vocabulary,
            chat=chat,
            served=self.served,
            name=name,
            garbage="garbage" in self.faults,
            usage_error=int(self.faults.number("wrong-usage", 3) or 0),
        )
        jobs = []
        at = self.now_s()
        size = self.simulator.settings.block_size
        for choice, (output, wanted) in zip(choices, outputs, strict=True):
            keys = block_keys(choice.prompt, size) if self.simulator.settings.prefix_caching else ()
            work = Work(at, len(choice.prompt), output, keys, int(body.get("priority") or 0))
            job = self.simulator.submit(work, at)
            self.streams[job.id] = (stream, choice, wanted)
            jobs.append(job)
        connection.on_close = lambda: self._gone(jobs)
        stream.open()
        every = self.faults.number("reset", 4)
        if every is not None and self.requests % int(every) == 0:
            connection.reset()
        self.ring()

    def _output_tokens(self, body: Mapping[str, Any], prompt: list[int], chat: bool) -> tuple[int, int]:
        """How many tokens will come, and how many were allowed."""
        limit = self.simulator.settings.max_model_len
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        wanted = int(asked) if asked else (limit - len(prompt) if chat else 16)
        if wanted > limit:
            raise BadRequest(
                f"max_tokens={wanted} cannot be greater than max_model_len={limit}. Please request fewer output "
                f"tokens. (parameter=max_tokens, value={wanted})",
                "max_tokens",
            )
        if len(prompt) + (wanted if asked else 1) > limit:
            raise BadRequest(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens "
                f"and your prompt contains {len(prompt)} input tokens, for a total of {len(prompt) + wanted} tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens.",
                "input_tokens",
            )
        output = min(wanted, limit - len(prompt))
        if not body.get("ignore_eos"):
            rng = random.Random(self.answers.context(prompt))
            natural = 1 + int(rng.lognormvariate(4.6, 0.8))
            output = min(output, max(natural, int(body.get("min_tokens") or 0)))
        if "short-output" in self.faults:
            output = max(output // 2, 1)
        return output, wanted

    def _gone(self, jobs: list[Job]) -> None:
        for job in jobs:
            if self.streams.pop(job.id, None):
                self.simulator.abort(job)

    def state(self) -> dict[str, Any]:
        """What only the emulator can tell of itself: how late it was (wall clock), how fast its time goes."""
        late = self.lateness
        return {
            "emulated": True,
            "gpu": self.simulator.gpu.name,
            "time_scale": self.scale,
            "lateness_p50_s": late.quantile(0.5),
            "lateness_p99_s": late.quantile(0.99),
            "lateness_max_s": late.max_s,
            "deliveries": late.total,
        }


def block_keys(tokens: list[int], size: int) -> tuple[int, ...]:
    """Chained hashes of the full blocks of ``tokens``."""
    keys, chain = [], 0
    for begin in range(0, len(tokens) - size + 1, size):
        chain = hash((chain, *tokens[begin : begin + size]))
        keys.append(chain)
    return tuple(keys)
