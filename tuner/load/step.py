"""One load step: the trace goes out, records come back, the metrics are computed from the records file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuner.engines.protocol import Cancelled, Endpoint, StepPlan
from tuner.load.flight import Tower
from tuner.load.probe import Found, probe
from tuner.load.prompts import token_ids
from tuner.load.records import RecordWriter
from tuner.load.shards import Fleet, Job, shard_count
from tuner.load.windows import warp
from tuner.load.wire import Writer, target
from tuner.study.outcome import Step

_PROGRESS_S = 0.5
_ALIVE_S = 0.5


def measure(
    endpoint: Endpoint,
    plan: StepPlan,
    *,
    alive: Callable[[], bool] = lambda: True,
    concurrency: int = 0,
    shards: int | None = None,
) -> Step:
    """Replays ``plan.trace`` at ``plan.load`` against ``endpoint`` and returns what was measured.

    The open loop sends every request at its intended time; ``concurrency`` above 0 asks for a closed loop instead (the
    metrics then hold ``closed_loop_concurrency``). ``shards`` overrides how many client processes send.

    ``alive`` is asked twice a second whether the server still lives. When it does not, the replay ends, its open
    requests are errors, and the Step is returned: what a dead server means is the engine's to say.
    Raises Cancelled when ``plan.cancel`` is set (the records until then are written); UsageError where the server does
    not speak the API, EnvironmentFault where nothing answers at all.
    """
    found = probe(endpoint, text_only=plan.trace.texts is not None)
    replay = _Replay(endpoint, plan, found, alive, concurrency, shards)
    return replay.run()


@dataclass(slots=True)
class _Replay:
    endpoint: Endpoint
    plan: StepPlan
    found: Found
    alive: Callable[[], bool]
    concurrency: int
    shards: int | None
    _stopped: str = ""

    def run(self) -> Step:
        plan, trace = self.plan, self.plan.trace
        offsets_s = warp(trace.arrival_s, plan.load)
        offsets_ns = [round(offset * 1e9) for offset in offsets_s.tolist()]
        shards = self.shards or shard_count(offsets_s, trace.output_tokens)
        job = Job(
            target(self.endpoint.url), offsets_ns, self._requests(), plan.request_timeout_s, shards, self.concurrency
        )
        writer = RecordWriter(plan.records)
        try:
            with Fleet(job) as fleet:
                started_unix_s = time.time() + (fleet.epoch_ns - time.monotonic_ns()) / 1e9
                tower = Tower(
                    fleet.epoch_ns,
                    self.found.dialect.counting,
                    trace.input_tokens,
                    trace.output_tokens,
                    int(plan.warmup_s * 1e9),
                    writer.add,
                )
                self._follow(fleet, tower, float(offsets_s[-1]) if len(trace) else 0.0)
            writer.close(self._meta(started_unix_s, tower, shards))
        except BaseException:
            writer.discard()
            raise
        if self._stopped == "cancelled":
            raise Cancelled("the replay was cancelled")
        return self._step()

    def _requests(self) -> Callable[[int], bytes]:
        plan, trace, found = self.plan, self.plan.trace, self.found
        write = Writer(
            target(self.endpoint.url), found.dialect, self.endpoint.api_key, plan.sampling, plan.output == "forced"
        ).request
        wanted = trace.output_tokens
        if trace.texts is not None:
            texts = trace.texts
            return lambda i: write(texts[i], int(wanted[i]))
        prompts = token_ids(trace, found.vocab_size, found.special_ids, prompt_seed(plan))
        if found.dialect.prompt == "ids":
            return lambda i: write(prompts[i].tolist(), int(wanted[i]))
        text = _texts(self.endpoint.tokenizer)
        return lambda i: write(text(prompts[i].tolist()), int(wanted[i]))

    def _follow(self, fleet: Fleet, tower: Tower, span_s: float) -> None:
        plan, n = self.plan, len(self.plan.trace)
        next_progress_s = next_alive_s = time.monotonic()
        begin_s = fleet.epoch_ns / 1e9
        while (events := fleet.events(0.1)) is not None:
            tower.take(events)
            now_s = time.monotonic()
            if self._stopped:
                continue
            if plan.cancel.is_set():
                self._stop(fleet, "cancelled")
            elif now_s >= next_alive_s:
                next_alive_s = now_s + _ALIVE_S
                if not self.alive():
                    self._stop(fleet, "server died")
            if now_s >= next_progress_s:
                next_progress_s = now_s + _PROGRESS_S
                elapsed_s = max(0.0, now_s - begin_s)
                remaining_s = max(0.0, span_s - elapsed_s)
                if not self.concurrency:
                    plan.on_event(
                        "progress",
                        {"done": tower.ended, "total": n, "elapsed_s": elapsed_s, "remaining_s": remaining_s},
                    )

    def _stop(self, fleet: Fleet, reason: str) -> None:
        self._stopped = reason
        fleet.stop({"cancelled": b"c", "server died": b"d"}.get(reason, b"s"))

    def _meta(self, started_unix_s: float, tower: Tower, shards: int) -> dict[str, Any]:
        plan = self.plan
        client: dict[str, Any] = dict(tower.lags())
        client["shards"] = shards
        if self.concurrency:
            client["closed_loop_concurrency"] = self.concurrency
        return {
            "epoch_unix_s": started_unix_s,
            "load": plan.load,
            "window": plan.window,
            "trace": plan.trace.name,
            "warmup_s": plan.warmup_s,
            "output": plan.output,
            "planned_requests": len(plan.trace),
            "prompt_seed": prompt_seed(plan),
            "request_timeout_s": plan.request_timeout_s,
            "stopped": self._stopped,
            "dialect": {
                "route": self.found.dialect.route,
                "prompt": self.found.dialect.prompt,
                "counting": self.found.dialect.counting,
                "forced": self.found.dialect.forced and plan.output == "forced",
            },
            "notes": self.found.dialect.notes,
            "client": client,
        }

    def _step(self) -> Step:
        from tuner.measure.metrics import metrics_from_records
        from tuner.measure.trust import untrusted

        plan = self.plan
        metrics, intervals = metrics_from_records(plan.records, plan.slos, plan.quantiles)
        return Step(
            load=plan.load,
            window=plan.window,
            metrics=metrics,
            intervals=intervals,
            slo_misses=tuple(miss for slo in plan.slos if (miss := slo.miss(metrics))),
            untrusted=untrusted(metrics, plan.slos),
            stopped_early=self._stopped,
            records=plan.records.name,
        )


def prompt_seed(plan: StepPlan) -> int:
    """The prompts' seed: other prompts for another seed, load or window, so that one step of a ladder does not find the
    prompts of the step before in the server's prefix cache."""
    text = json.dumps([plan.seed, plan.load, plan.window])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _texts(tokenizer: str) -> Callable[[list[int]], str]:
    """Token ids to text, for servers that take no ids: by the tokenizer where it is known, else one word per token."""
    if tokenizer:
        from tokenizers import Tokenizer

        from tuner.load.prompts import model_folder

        decode = Tokenizer.from_file(str(model_folder(tokenizer) / "tokenizer.json")).decode
        return lambda ids: decode(ids)
    return lambda ids: " ".join(_word(i) for i in ids)


def _word(number: int) -> str:
    """A short pronounceable word for a number: common tokenizers spend one or two tokens on it."""
    consonants, vowels = "bcdfghjklmnprstvz", "aeiou"
    pairs = len(consonants) * len(vowels)
    text = ""
    while True:
        number, pair = divmod(number, pairs)
        text += consonants[pair // len(vowels)] + vowels[pair % len(vowels)]
        if not number:
            return text
