"""One load step: the trace goes out, records come back, the metrics are computed from the records file."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np

from tuner.engines.protocol import Cancelled, Endpoint, StepPlan
from tuner.errors import UsageError, printable
from tuner.load.flight import Tower
from tuner.load.probe import Found, probe
from tuner.load.prompts import PromptTexts, token_ids
from tuner.load.records import Record, Records, RecordWriter, read
from tuner.load.shards import Fleet, Job, shard_count
from tuner.load.sharing import shared_tokens
from tuner.load.trace import Trace, with_earlier
from tuner.load.windows import warp
from tuner.load.wire import Writer, target
from tuner.measure.early import QueueWatch, SloWatch
from tuner.measure.server import Sampler, beside, fold, write
from tuner.measure.trust import UNFILLED
from tuner.spec.slo import Slo
from tuner.study.outcome import Step

_PROGRESS_S = 0.5
_ALIVE_S = 0.5
_EARLY_S = 1.0
_FEW = 16  # prompts are made so many at once
FILLING = 32  # earlier prompts under way at once
_HANGING_S = 120.0  # in which not one of them ended

_STILL_S = 60.0  # beyond what a request may take: in which none ended, or began, though all should have
_LEAVE_S = 10.0  # in which a client that was told to stop says nothing: it is suspended, and ends no more

TOLD = 200  # characters of an error
CLIENT_DIED = "a client process died"
CLIENT_BEHIND = "the client could not keep up with what it received"


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

    The prompts of ``plan.trace.earlier`` are sent first, one token each, as fast as the server takes them; nothing of
    them is measured.

    ``alive`` is asked twice a second whether the server still lives. When it does not, the replay ends, its open
    requests are errors, and the Step is returned: what a dead server means is the engine's to say.
    Raises Cancelled when ``plan.cancel`` is set (the records until then are written); UsageError where the server does
    not speak the API, Unreachable where nothing answers at all, OSError where the records cannot be written.
    """
    if not len(plan.trace):
        raise UsageError(f"trace {plan.trace.name} has no request")
    found = probe(endpoint, text_only=plan.trace.texts is not None)
    replay = _Replay(endpoint, plan, found, alive, concurrency, shards)
    for note in replay.notes:
        plan.on_event("note", {"text": note})
    return replay.run()


@dataclass(slots=True)
class _Replay:
    endpoint: Endpoint
    plan: StepPlan
    found: Found
    alive: Callable[[], bool]
    concurrency: int
    shards: int | None
    stopped: str = ""
    filled: Mapping[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the prompts have the trace's number of tokens by the server's own count."""
        return self.plan.trace.texts is None and (self.found.dialect.prompt == "ids" or bool(self.found.words))

    @property
    def notes(self) -> tuple[str, ...]:
        """In words what is less exact than it could be."""
        return self.found.notes if self.plan.trace.texts is None else self.found.dialect.notes

    def run(self) -> Step:
        plan, trace = self.plan, self.plan.trace
        where = target(self.endpoint.url)
        offsets_s = warp(trace.arrival_s, plan.load)
        offsets_ns = np.round(offsets_s * 1e9).astype(np.int64)
        shards = min(self.shards or shard_count(offsets_s, trace.output_tokens), len(trace))
        shards = min(shards, self.concurrency) if self.concurrency else shards
        requests = self._requests(shards)
        wanted, first = trace.output_tokens.tolist(), len(trace.earlier or ())
        if first:
            self.filled = self._fill(requests)

        def request(i: int) -> bytes:
            return requests(first + i, wanted[i])

        job = Job(where, offsets_ns.tolist(), request, plan.request_timeout_s, shards, self.concurrency, plan.cancel)
        warmup_ns = int(plan.warmup_s * 1e9)
        writer = RecordWriter(plan.records)
        early = plan.early_stop and not self.concurrency
        forced = self.found.dialect.forced and plan.output == "forced"
        watch = Watch(plan if early else replace(plan, slos=()), offsets_ns, early and forced)
        sampler = Sampler(where, self.endpoint.api_key)

        def done(record: Record) -> None:
            writer.add(record)
            watch.done(record)

        tower: Tower | None = None
        epoch_unix_s = 0.0
        try:
            with sampler, Fleet(job) as fleet:
                epoch_ns = fleet.epoch_ns
                epoch_unix_s = time.time() + (epoch_ns - time.monotonic_ns()) / 1e9
                counting = self.found.dialect.counting
                tower = Tower(epoch_ns, counting, trace.input_tokens, trace.output_tokens, warmup_ns, done, shards)
                self._follow(fleet, tower, watch, float(offsets_s[-1]))
                end_ns = time.monotonic_ns()
            sampler.settle(tower.output_tokens)
            server = fold(sampler.samples, epoch_ns + warmup_ns, min(end_ns, epoch_ns + int(offsets_ns[-1])))
            writer.close(self._meta(epoch_unix_s, tower, shards, server))
        except BaseException as error:
            self.stopped = "cancelled"
            if tower is None or not isinstance(error, KeyboardInterrupt):
                writer.discard()
            else:  # whoever will not wait for the end still has what was measured
                writer.close(self._meta(epoch_unix_s, tower, shards, {}))
            raise
        if sampler.samples:
            write(beside(plan.records), sampler.samples, epoch_ns)
        if self.stopped == "cancelled":
            raise Cancelled("the replay was cancelled")
        return judge(read(plan.records), plan.slos, plan.quantiles)

    def _fill(self, requests: Callable[[int, int], bytes]) -> dict[str, float]:
        """Sends the earlier prompts in order; how many, how many of them failed, and how long it took. A server that
        dies of it is found dead by the replay, one that fails or hangs is not asked on. Tells ``filled`` at the end."""
        plan, earlier = self.plan, cast(Trace, self.plan.trace.earlier)
        plan.on_event("phase", {"name": "filling the prefix cache"})
        served, began_s, ended, ended_s, next_s = 0, time.monotonic(), 0, time.monotonic(), {"alive": 0.0}
        n, where = len(earlier), target(self.endpoint.url)

        def done(record: Record) -> None:
            nonlocal served
            served += not record.error

        most, timeout_s = min(n, FILLING), plan.request_timeout_s
        job = Job(where, [0] * n, lambda i: requests(i, 1), timeout_s, concurrency=most, cancel=plan.cancel)
        with Fleet(job) as fleet:
            counting, ones = self.found.dialect.counting, np.ones(n, dtype=np.int64)
            tower = Tower(fleet.epoch_ns, counting, earlier.input_tokens, ones, 0, done, 1)
            while (events := fleet.events(0.1)) is not None:
                tower.take(events)
                if plan.cancel.is_set():
                    raise Cancelled("the replay was cancelled")
                now_s = time.monotonic()
                ended, ended_s = (tower.ended, now_s) if tower.ended > ended else (ended, ended_s)
                if ended - served > UNFILLED * n or now_s - ended_s > _HANGING_S:
                    break
                if _due(next_s, "alive", now_s - began_s, _ALIVE_S) and not self.alive():
                    break
        facts = {"fill_requests": n, "fill_failures": n - served, "fill_s": time.monotonic() - began_s}
        plan.on_event("filled", facts)
        return facts

    def _requests(self, shards: int) -> Callable[[int, int], bytes]:
        """The bytes of the i-th request, the earlier ones counted, which asks for so many tokens."""
        plan, trace, found = self.plan, with_earlier(self.plan.trace), self.found
        where, forced = target(self.endpoint.url), plan.output == "forced"
        request = Writer(where, found.dialect, self.endpoint.api_key, plan.sampling, forced).request
        if trace.texts is not None:
            own = trace.texts
            return lambda i, wanted: request(own[i], wanted)
        seed = prompt_seed(plan)
        if found.words:
            texts = PromptTexts(trace, found.words, seed, found.overhead_tokens)
            return lambda i, wanted: request(texts[i], wanted)
        prompts = token_ids(trace, found.vocab_size, found.special_ids, seed)
        if found.dialect.prompt == "ids":
            few = lru_cache(2 * shards)(lambda k: prompts[_FEW * k : _FEW * (k + 1)])
            return lambda i, wanted: request(few(i // _FEW)[i % _FEW].tolist(), wanted)
        return lambda i, wanted: request(_made_up(prompts[i].tolist()), wanted)

    def _follow(self, fleet: Fleet, tower: Tower, watch: Watch, span_s: float) -> None:
        """Takes the events until the last; stops the fleet when there is a reason to."""
        plan, total = self.plan, len(self.plan.trace)
        last_s = 0.0 if self.concurrency else span_s  # a trace may have nothing to send for hours
        next_s: dict[str, float] = {"progress": 0.0, "alive": 0.0, "early": 0.0}
        heard_s = 0.0  # after the start
        while (events := fleet.events(0.1)) is not None:
            tower.take(events)
            elapsed_s = time.monotonic() - fleet.epoch_ns / 1e9
            heard_s = elapsed_s if events else heard_s
            if self.stopped:
                if elapsed_s - heard_s > _LEAVE_S:
                    return  # leaving the fleet kills it
            else:
                if plan.cancel.is_set():
                    self._stop(fleet, "cancelled", b"c")
                elif fleet.running < tower.lost:
                    self._stop(fleet, CLIENT_DIED, b"s")  # what it had in flight is lost
                elif tower.behind:
                    self._stop(fleet, CLIENT_BEHIND, b"s")
                elif elapsed_s - max(heard_s, last_s) > plan.request_timeout_s + _STILL_S:
                    self._stop(fleet, CLIENT_DIED, b"s")
                elif _due(next_s, "alive", elapsed_s, _ALIVE_S) and not self.alive():
                    self._stop(fleet, "the server died", b"d")
                elif _due(next_s, "early", elapsed_s, _EARLY_S) and (reason := watch.verdict(tower)):
                    self._stop(fleet, reason, b"s")
            if _due(next_s, "progress", elapsed_s, _PROGRESS_S):
                if self.concurrency:
                    remaining_s = elapsed_s * (total - tower.ended) / tower.ended if tower.ended else math.inf
                else:
                    remaining_s = max(0.0, span_s - elapsed_s)
                data = {"done": tower.ended, "total": total, "elapsed_s": max(0.0, elapsed_s)}
                plan.on_event("progress", {**data, "remaining_s": remaining_s})

    def _stop(self, fleet: Fleet, reason: str, code: bytes) -> None:
        self.stopped = reason
        fleet.stop(code)

    def _meta(self, epoch_unix_s: float, tower: Tower, shards: int, server: Mapping[str, float]) -> dict[str, Any]:
        plan, dialect = self.plan, self.found.dialect
        client: dict[str, float] = {**tower.facts(), **self.filled, "shards": shards}
        if plan.trace.texts is None:  # what no prefix cache can exceed that has not seen these prompts before
            sent = slice(0, tower.sent)  # they leave in order
            shared = int(shared_tokens(plan.trace)[sent].sum())
            client["trace_prefix_share"] = shared / max(1, int(plan.trace.input_tokens[sent].sum()))
        if self.concurrency:
            client["closed_loop_concurrency"] = self.concurrency
        return {
            "epoch_unix_s": epoch_unix_s,
            "load": plan.load,
            "lasts_s": 0.0 if self.concurrency else plan.trace.until_s / plan.load,
            "window": plan.window,
            "trace": plan.trace.name,
            "planned_requests": len(plan.trace),
            "warmup_s": plan.warmup_s,
            "request_timeout_s": plan.request_timeout_s,
            "output": plan.output,
            "exact_prompts": self.exact,
            "prompt_seed": prompt_seed(plan),
            "stopped": self.stopped,
            "slos": {slo.metric: slo.limit for slo in plan.slos},
            "dialect": asdict(dialect),
            "notes": self.notes,
            "client": client,
            "server": dict(server),
        }


class Watch:
    """The early stop's two questions, asked about a step as it runs. Without SLOs and with outputs that are not
    ``forced`` there is nothing to ask."""

    def __init__(self, plan: StepPlan, offsets_ns: np.ndarray, forced: bool) -> None:
        trace, warmup_ns = plan.trace, int(plan.warmup_s * 1e9)
        self._input, self._wanted = trace.input_tokens, trace.output_tokens
        self._slos = SloWatch(plan.slos, offsets_ns, trace.output_tokens, warmup_ns, forced)
        # an output that the model may end at any time is owed no tokens
        self._queue = QueueWatch(offsets_ns, self._input + self._wanted, warmup_ns) if forced else None
        self.done = self._slos.done

    def verdict(self, tower: Tower) -> str:
        """Why the step may end, or nothing. Judged as of the time until which the tower knows what happened: a token
        that has arrived, and waits to be parsed, is not late."""
        now_ns = tower.known_until_ns
        if now_ns is None:
            return ""
        flights = [flight for flight in tower.flights.values() if flight.sent_ns <= now_ns]
        if reason := self._slos.verdict(now_ns, flights):
            return reason
        if not self._queue:
            return ""
        waiting, owed, ages_s = 0, 0, []
        for flight in flights:
            left = int(self._wanted[flight.number]) - flight.produced
            if (first_ns := flight.first_token_ns) is None:
                waiting += int(self._input[flight.number]) + left
            else:
                owed += left
                ages_s.append((now_ns - first_ns) / 1e9)
        return self._queue.verdict(now_ns / 1e9, waiting, waiting + owed, sum(ages_s) / max(1, len(ages_s)))


def _due(next_s: dict[str, float], name: str, now_s: float, every_s: float) -> bool:
    """Whether it is time again for ``name``."""
    if now_s < next_s[name]:
        return False
    next_s[name] = now_s + every_s
    return True


def judge(records: Records, slos: Sequence[Slo], quantiles: Sequence[float]) -> Step:
    """The Step that a records file tells, from nothing else.

    ``slos`` need not be those of the replay. Where it was ended early because one of those was lost, the records say
    nothing certain about others: the step is then untrusted, and misses none.
    """
    from tuner.measure.metrics import compute
    from tuner.measure.trust import not_their_length, untrusted

    if not records.meta.keys() >= {"load", "window", "stopped"}:
        raise UsageError("does not say which load step it is of", where=str(records.path))
    metrics, intervals = compute(records, slos, quantiles)
    stopped, open_ones = str(records.meta["stopped"]), undecided(records.meta, slos)
    reasons = [f"undecided: {slo}, for the step was ended early under other SLOs ({stopped})" for slo in open_ones]
    if not metrics["measured_requests"] and not stopped:
        reasons.append("no request lies after the warm-up: measure for longer, or warm up for less")
    return Step(
        load=float(records.meta["load"]),
        window=str(records.meta["window"]),
        metrics=metrics,
        intervals=intervals,
        slo_misses=() if reasons else _and_why(misses(metrics, slos, stopped), records),
        untrusted=(*untrusted(metrics, slos), *not_their_length(records.meta, metrics), *reasons),
        stopped_early=stopped,
        records=records.path.name,
    )


def misses(metrics: Mapping[str, float], slos: Sequence[Slo], stopped: str) -> tuple[str, ...]:
    """Each SLO's miss in words. A step that was ``stopped`` because its queue grows without bound holds no SLO on a
    latency, though the waits had not reached the limit when it was stopped; what it has no figure of by then (the TPOT
    of requests that were all cut off) is no miss of its own beside the reason for which it was stopped."""
    ended = stopped and stopped not in (CLIENT_DIED, CLIENT_BEHIND) and any(slo.latency for slo in slos)
    missed = tuple(miss for slo in slos if (miss := slo.miss(metrics)) and (slo.key in metrics or not ended))
    return missed or ((stopped,) if ended else ())


def _and_why(missed: tuple[str, ...], records: Records) -> tuple[str, ...]:
    """The misses, and after them what most of the requests that failed had: an SLO is not missed by load alone."""
    if not missed or not (failed := records.failures()):
        return missed
    words = printable(" ".join(next(iter(failed)).split()))[:TOLD]
    return (*missed, f"{sum(failed.values())} of {len(records)} requests failed, most with: {words}")


def undecided(meta: Mapping[str, Any], slos: Sequence[Slo]) -> tuple[Slo, ...]:
    """Those of ``slos`` that a replay leaves open which was ended early because an SLO of its own was lost: all, unless
    one of them is lost with that one (a limit as tight or tighter on a percentile as high or higher)."""
    metric, lost, _ = str(meta["stopped"]).partition(" cannot hold ")
    if not lost:
        return ()
    limit = (meta.get("slos") or {}).get(metric, 0.0)  # a file that does not tell: nothing is certain
    theirs = Slo(metric, limit)
    if any(slo.limit <= limit and (slo.metric == metric or _above(slo, theirs)) for slo in slos):
        return ()
    return tuple(slos)


def _above(one: Slo, other: Slo) -> bool:
    """Whether ``one`` is on the same latency at a percentile at least as high, or on the maximum."""
    if not one.latency or one.latency != other.latency or other.quantile is None:
        return False
    return one.metric.endswith("_max") or (one.quantile or 0.0) >= other.quantile


def prompt_seed(plan: StepPlan) -> int:
    """The prompts' seed: other prompts for another seed, load or window, so that one step of a ladder does not find the
    prompts of the step before in the server's prefix cache."""
    text = json.dumps([plan.seed, plan.load, plan.window])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _made_up(ids: list[int]) -> str:
    """Token ids as words, for servers that take no ids and of whose tokenizer no whole words are known."""
    return " ".join(map(_word, ids))


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
