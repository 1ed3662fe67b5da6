"""The emulator without a process: the same start-up, log and simulation on a clock that nobody waits for.

A step's records come from the simulation itself, not from a client, so there is no lag to distrust and no launcher to
rehearse: a study of thirty launches takes a minute.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tuner.engines.emulator.assemble import assemble
from tuner.engines.emulator.boot import Boot, BootFailed
from tuner.engines.emulator.console import Console
from tuner.engines.emulator.faults import parse_faults
from tuner.engines.emulator.hardware import Gpu
from tuner.engines.emulator.rescale import step_from_records
from tuner.engines.emulator.simulator import OutOfMemoryUnderLoad, Served, Simulator, Work, prefix_keys
from tuner.engines.protocol import Cancelled, Endpoint, LaunchFailed, OnEvent, Site, StepPlan, Teardown
from tuner.engines.vllmlog import DIALECT
from tuner.load.records import Record, write
from tuner.load.step import FILLING
from tuner.load.trace import Trace
from tuner.load.windows import warp
from tuner.server.bootlog import BootLog
from tuner.server.diagnosis import Evidence, diagnose
from tuner.study.outcome import Boot as BootTimes
from tuner.study.outcome import Step

LOG = "server.log"


class _Tape(Console):
    """A console that keeps what is said, and a clock that sleeping moves."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now_s = 0.0
        self.boot_log = BootLog(DIALECT, 0.0)

    def raw(self, text: str) -> None:
        self.lines.append(text)
        self.boot_log.feed(text.split("\n"), self.now_s)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class VirtualServer:
    """Implements :class:`tuner.engines.protocol.Server` on virtual time; ``endpoint`` is None."""

    def __init__(self, simulator: Simulator, boot: BootTimes, on_event: OnEvent) -> None:
        self.boot = boot
        self._on_event = on_event
        self.endpoint: Endpoint | None = None
        self._simulator = simulator
        self._now_s = 0.0
        self._step = 0

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol. Equal seeds give equal records."""
        if plan.cancel.is_set():
            raise Cancelled("the replay was cancelled")
        trace = plan.trace
        self._step += 1
        rng = random.Random(f"{plan.seed}-{plan.load}-{plan.window}")
        wanted = trace.output_tokens.tolist()
        if plan.output == "free":
            wanted = [min(tokens, 1 + int(rng.lognormvariate(4.6, 0.8))) for tokens in wanted]
        try:
            client = self._fill(trace.earlier) if trace.earlier is not None else {}
            served = self._simulator.run(self._works(trace, warp(trace.arrival_s, plan.load).tolist(), wanted))
        except OutOfMemoryUnderLoad as error:
            text = f"torch.OutOfMemoryError: {error}"
            raise LaunchFailed(diagnose(Evidence(log=text, exit_code=1, phase="load", stage="under load"))) from None
        base_s = self._now_s
        records = [_record(i, one, base_s, plan) for i, one in enumerate(served)]
        self._rest(served)
        write(plan.records, records, _meta(plan, client))
        if plan.cancel.is_set():
            raise Cancelled("the replay was cancelled")
        return step_from_records(plan)

    def _fill(self, earlier: Trace) -> dict[str, float]:
        """Serves the prompts of ``earlier``, a token each: as many at once as the client has under way, in order.
        Returns what the client would know of it."""
        begin_s = self._now_s
        works = self._works(earlier, [0.0] * len(earlier), [1] * len(earlier))
        for first in range(0, len(works), FILLING):
            some = [replace(work, arrival_s=self._now_s) for work in works[first : first + FILLING]]
            self._rest(self._simulator.run(some), pause_s=0.0)
        return {"fill_requests": len(works), "fill_failures": 0, "fill_s": self._now_s - begin_s}

    def _works(self, trace: Trace, offsets_s: list[float], wanted: list[int]) -> list[Work]:
        """The requests of ``trace``, so long after now, with prompts that only this step has."""
        size, works = self._simulator.settings.block_size, []
        for index, (offset_s, tokens) in enumerate(zip(offsets_s, wanted, strict=True)):
            ids = trace.block_ids[trace.block_offsets[index] : trace.block_offsets[index + 1]].tolist()
            prompt = int(trace.input_tokens[index])
            keys = prefix_keys(ids, trace.block_tokens, prompt, size, salt=self._step)
            works.append(Work(self._now_s + offset_s, prompt, tokens, keys))
        return works

    def _rest(self, served: list[Served], pause_s: float = 1.0) -> None:
        """So long after the last token of ``served`` it goes on."""
        self._now_s = max([one.tokens_s[-1] for one in served if one.tokens_s], default=self._now_s) + pause_s

    def stop(self) -> Teardown:
        """See the protocol; there is nothing to stop."""
        self._on_event("took", {"seconds": self.boot.total_s + self._now_s})
        return Teardown()


def launch_virtual(
    flags: Mapping[str, str | None],
    options: Mapping[str, Any],
    fault: str,
    gpu: Gpu,
    environ: Mapping[str, str],
    site: Site,
) -> VirtualServer:
    """Goes through the start-up in virtual time; raises :class:`LaunchFailed` with the diagnosis of its last words."""
    tape = _Tape()
    boot = Boot(tape, parse_faults(fault), float(options.get("boot_scale", 1.0)), tape.sleep)
    try:
        simulator, _ = assemble(boot, flags, options, gpu, environ)
    except BootFailed as failed:
        log = tape.boot_log
        site.on_event("took", {"seconds": tape.now_s})
        evidence = Evidence(log="\n".join(tape.lines), exit_code=failed.code, phase=log.phase)
        raise LaunchFailed(_with_boot(diagnose(evidence), log.boot(tape.now_s))) from None
    finally:
        (site.folder / LOG).write_text("\n".join(tape.lines) + "\n", encoding="utf-8")
    times = tape.boot_log.boot(tape.now_s)
    site.on_event("phase", {"name": "ready", "elapsed_s": round(times.total_s, 1), "expected_s": None})
    return VirtualServer(simulator, times, site.on_event)


def _with_boot(outcome: Any, boot: BootTimes) -> Any:
    return replace(outcome, boot=boot)


def _record(index: int, one: Served, base_s: float, plan: StepPlan) -> Record:
    intended = _ns(one.work.arrival_s - base_s)
    limit = intended + _ns(plan.request_timeout_s)
    times = array("q")
    for at, count in zip(one.tokens_s, one.counts, strict=True):
        if (at_ns := _ns(at - base_s)) <= limit:
            times.extend([at_ns] * count)
    late = not one.tokens_s or _ns(one.tokens_s[-1] - base_s) > limit
    first, last = (times[0], times[-1]) if times else (None, None)
    return Record(
        request=index,
        intended_ns=intended,
        sent_ns=intended,
        first_byte_ns=first,
        first_byte_read_ns=first,
        first_token_ns=first,
        last_token_ns=last,
        end_ns=limit if late else last,
        token_ns=times,
        input_tokens=one.work.input_tokens,
        prompt_tokens=one.work.input_tokens,
        wanted_tokens=int(plan.trace.output_tokens[index]),
        output_tokens=len(times),
        error="timeout" if late else "",
        warmup=intended < _ns(plan.warmup_s),
        retried=False,
        read_lag_ns=0,
    )


def _meta(plan: StepPlan, client: Mapping[str, float]) -> dict[str, Any]:
    return {
        "epoch_unix_s": 0.0,
        "load": plan.load,
        "lasts_s": plan.trace.until_s / plan.load,
        "window": plan.window,
        "trace": plan.trace.name,
        "warmup_s": plan.warmup_s,
        "output": plan.output,
        "planned_requests": len(plan.trace),
        "request_timeout_s": plan.request_timeout_s,
        "stopped": "",
        "emulated": "virtual clock",
        "client": dict(client),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
