"""From what a failed server left (its log, how it ended, where it was) to a cause, its proof and its fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tuner.server.bootlog import LINE
from tuner.server.faults import CONSEQUENCES, RULES, SIGNALS, WRONG_CONFIG, Rule
from tuner.study.outcome import Infeasible

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "bytes": 1}
_CLOCK = r"\d+\.\d\d\.\d{3}\.\d{3}"  # llama.cpp's, before the level's letter
_PREFIX = re.compile(
    rf"^{_CLOCK} [A-Z] +|^(\([^)]*pid=\d+[^)]*\) )?((INFO|DEBUG|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?"
)
_QUIET = re.compile(rf"^{_CLOCK} [DITW] |^(\([^)]*pid=\d+[^)]*\) )?(INFO|DEBUG|WARNING)\b")
_EXCEPTION = re.compile(r"^\s*(?:[\w.]+\.)?(?P<type>\w*(?:Error|Exception|Failure|Interrupt))\b(?:: (?P<text>.*))?$")
_FRAME = re.compile(r'^File ".+", line \d+')
_PYDANTIC = re.compile(r"^Value error, | \[type=.*$")
_VALUE_ERROR = re.compile(r"^\s*Value error, (?P<text>.*?)( \[type=.*)?$")
_WORKER_DIED = re.compile(
    r"died unexpectedly \(exit code: (?P<code>-\d+)\)|Failed core proc\(s\): \{[^}]*?: (?P<core>-\d+)"
)
# Before 0.26 vLLM names no exit code.
_WORKER_VANISHED = re.compile(r"Worker proc \S+ died unexpectedly( \(exit code: None\)|,)")
_ALLOCATION = re.compile(
    r"Tried to allocate (?P<need>[\d.]+) (?P<need_unit>[GM]iB)"
    r".*?of which (?P<have>[\d.]+) (?P<have_unit>[GM]iB) is free|"
    r"you tried to allocate (?P<bytes>\d+) bytes"
)
_KV_LEFT = re.compile(r"Available KV cache memory: (?P<have>-[\d.]+) ?GiB")
_EVIDENCE = 400


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a failed server.

    ``exit_code`` as ``subprocess`` gives it (negative: the signal; None: it still ran); ``phase`` of its start-up;
    ``late`` is empty or why it was given up on (``hang: ...``, ``slow: ...``); ``stage`` as in an outcome.
    """

    log: str
    exit_code: int | None = None
    phase: str = ""
    late: str = ""
    stage: str = "start-up"


def diagnose(evidence: Evidence) -> Infeasible:
    """The failure's cause, the line that proves it and what to do about it. Pure; always answers."""
    evidence = replace(evidence, log="\n".join(line[:LINE] for line in evidence.log.splitlines()))
    lines = list(_speaking(evidence.log))
    for look in (_from_rules, _from_ending, _from_exception, _from_silence):
        if found := look(evidence, lines):
            return found
    return _unexplained(evidence, lines)


def _speaking(log: str) -> Iterator[str]:
    """The lines that can be evidence, without their prefix: no chatter, no source code out of a traceback."""
    code = False
    for line in log.splitlines():
        if _QUIET.match(line):
            continue
        bare = _PREFIX.sub("", line).strip()
        if not bare or not bare.strip("^~ "):
            continue
        if not code:
            yield bare
        code = _FRAME.match(bare) is not None


def _from_rules(evidence: Evidence, lines: list[str]) -> Infeasible | None:
    for rule in RULES:
        if (rule.stage and rule.stage != evidence.stage) or (rule.phases and evidence.phase not in rule.phases):
            continue
        for line in lines:
            if (match := rule.pattern.search(line)) and not _passing_on(line):
                return _by_rule(evidence, rule, line, match)
    return None


def _by_rule(evidence: Evidence, rule: Rule, line: str, match: re.Match[str]) -> Infeasible:
    groups = {name: _PYDANTIC.sub("", value or "") for name, value in match.groupdict().items()}
    short = _short(match)
    if short is None and rule.cause.startswith("oom"):
        short = _short_elsewhere(evidence.log)
    message = rule.message.format(**groups)
    if short is not None and short > 0:
        message += f" ({short / 2**30:.2f} GiB short)"
    return _infeasible(evidence, rule.cause, message, line, rule.fix.format(**groups), rule.transient, short)


def _from_ending(evidence: Evidence, lines: list[str]) -> Infeasible | None:
    """Signals and time limits: said by no exception of the server's own."""
    if evidence.late.startswith("hang"):
        why = evidence.late.partition(": ")[2]
        last = _last(evidence.log)
        return _infeasible(
            evidence, "hang", why, last, f"look at what phase {evidence.phase} waits for; the log ends there", True
        )
    if evidence.late:
        why = evidence.late.partition(": ")[2]
        return _infeasible(
            evidence, "too-slow-to-start", why, _last(evidence.log), "raise engine.options.start_limit_s", False
        )
    code = evidence.exit_code
    proof = ""
    if code is None or code >= 0:
        for line in lines:
            if died := _WORKER_DIED.search(line):
                code, proof = int(died.group("code") or died.group("core")), line
                break
    if code is not None and code < 0:
        cause, message, fix, transient = SIGNALS.get(
            -code, ("crash", f"it died of signal {-code}", "see its log", True)
        )
        where = "a worker of the server" if proof else "the server"
        return _infeasible(evidence, cause, f"{where} died: {message}", proof or f"exit code {code}", fix, transient)
    return None


def _from_exception(evidence: Evidence, lines: list[str]) -> Infeasible | None:
    """The first exception that is not only the consequence of another."""
    for line in lines:
        if inner := _VALUE_ERROR.match(line):
            return _infeasible(
                evidence, "invalid-combination", inner.group("text"), line, "deny it in the search space (rules)", False
            )
        match = _EXCEPTION.match(line)
        if not match or _passing_on(line):
            continue
        text = match.group("text") or match.group("type")
        if text.endswith(":") or re.match(r"^\d+ validation error", text):
            continue  # pydantic's heading: the next lines say what is wrong
        if evidence.stage == "under load":
            return _infeasible(
                evidence, "crash-under-load", f"the server failed while serving: {text}", line, _LOAD_FIX, True
            )
        if match.group("type") in WRONG_CONFIG or evidence.phase == "config":
            return _infeasible(
                evidence, "invalid-combination", text, line, "deny it in the search space (rules)", False
            )
        return _infeasible(evidence, "crash", f"the server failed at start-up: {line}", line, "see its log", False)
    return None


def _from_silence(evidence: Evidence, lines: list[str]) -> Infeasible | None:
    """A worker that died without an exception of its own and before anybody learnt its exit code was killed."""
    for line in lines:
        if _WORKER_VANISHED.search(line):
            cause, message, fix, transient = SIGNALS[9]
            message = f"a worker of the server died without a word: {message}"
            return _infeasible(evidence, cause, message, line, fix, transient)
    return None


def _unexplained(evidence: Evidence, lines: list[str]) -> Infeasible:
    last = lines[-1] if lines else _last(evidence.log)
    if evidence.stage == "under load":
        if evidence.exit_code is None:
            return _infeasible(
                evidence, "unhealthy", "the server stopped answering its health check", last, _LOAD_FIX, True
            )
        message = f"the server ended while it was measured (exit code {evidence.exit_code})"
        return _infeasible(evidence, "crash-under-load", message, last, _LOAD_FIX, True)
    if evidence.exit_code == 127 and evidence.phase == "exec":
        return _infeasible(
            evidence,
            "missing-dependency",
            f"the program cannot be started: {last}",
            last,
            "check engine.command",
            False,
        )
    message = f"the server ended at start-up (exit code {evidence.exit_code})" + ("" if last else " without a word")
    return _infeasible(evidence, "crash", message, last, "see server.log in the trial's folder", False)


_LOAD_FIX = "see its log; a lower load, max-num-seqs or max-num-batched-tokens may avoid it"


def _infeasible(
    evidence: Evidence, cause: str, message: str, line: str, fix: str, transient: bool, short: int | None = None
) -> Infeasible:
    return Infeasible(
        cause=cause,
        message=message[:_EVIDENCE],
        evidence=line[:_EVIDENCE],
        fix=fix,
        stage=evidence.stage,
        short_bytes=short if short is None or short > 0 else None,
        transient=transient,
    )


def _passing_on(line: str) -> bool:
    return CONSEQUENCES.search(line) is not None


def _short(match: re.Match[str]) -> int | None:
    """Bytes missing, from a match with ``need`` and ``have``."""
    groups = match.groupdict()
    if not groups.get("need") or not groups.get("have"):
        return None
    need, have = (
        float(groups[name].replace(",", "")) * _UNITS[groups.get(f"{name}_unit") or "GiB"] for name in ("need", "have")
    )
    return round(need - have)


def _short_elsewhere(log: str) -> int | None:
    """Bytes missing, from the allocator's own words or the KV cache's negative size."""
    if match := _ALLOCATION.search(log):
        return int(match.group("bytes")) if match.group("bytes") else _short(match)
    if match := _KV_LEFT.search(log):
        return round(-float(match.group("have")) * 2**30)
    return None


def _last(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return _PREFIX.sub("", lines[-1]).strip() if lines else ""
