"""``tuner replay``: one trace at one load against any OpenAI-compatible server."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.signals import stopping
from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.load.records import Records
    from tuner.spec.slo import Slo
    from tuner.study.outcome import Step

_MISSED, _UNTRUSTED = 3, 4
_PROMPTS_OFF = 0.02  # of the trace's tokens, to be worth a line


def replay(
    url: Annotated[str, typer.Option(help="The server, for example http://127.0.0.1:8000.")] = "",
    trace: Annotated[Path | None, typer.Option(help="The trace file.")] = None,
    load: Annotated[float, typer.Option(help="Factor on the trace's arrival rate.")] = 1.0,
    model: Annotated[str, typer.Option(help="The served model's name (default: the first the server lists).")] = "",
    slo: Annotated[list[str] | None, typer.Option(help="For example ttft_p99=500ms; may be repeated.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Model folder or id: which token ids prompts may use.")] = "",
    requests: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Only the trace's first so many seconds.")] = None,
    warmup: Annotated[float, typer.Option(help="Seconds at the start that are sent but not counted.")] = 0.0,
    free_output: Annotated[bool, typer.Option(help="Let the model end its outputs (default: the trace's length).")] = (
        False
    ),
    closed_loop: Annotated[int, typer.Option(help="Keep N in flight instead of the trace's times. [default: 0]")] = 0,
    processes: Annotated[int | None, typer.Option(help="Client processes (default: by the rate and the cores).")] = (
        None
    ),
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 600.0,
    early_stop: Annotated[bool, typer.Option(help="End once the outcome is decided.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other prompts: no prefix cache finds the last.")] = 0,
    percentile: Annotated[
        list[float] | None, typer.Option(help="Percentiles to print; may be repeated. [default: 50 90 95 99]")
    ] = None,
    records: Annotated[Path | None, typer.Option(help="Keep the records in this Parquet file.")] = None,
    recompute: Annotated[bool, typer.Option(help="No replay: the metrics again from --records.")] = False,
    format: Annotated[str, typer.Option(help="The trace's format, where it is not recognised.")] = "auto",
    arrivals: Annotated[str | None, typer.Option(help="For a trace without times: poisson:RATE, ...")] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Bearer key.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a trace against a server and measure it.

    Exit code 0: measured, every SLO held; 3: an SLO was missed, or (without one on error_rate) over 1% failed; 4: the
    measurement cannot be trusted.
    """
    slos, quantiles = _slos(slo or ()), _quantiles(percentile)
    if recompute:
        step, kept = _again(records, slos, quantiles)
    else:
        if not url or trace is None:
            raise UsageError(
                "--url and --trace are needed", fix="tuner replay --url http://127.0.0.1:8000 --trace FILE"
            )
        step, kept = _run(
            url, trace, load, model, slos, tokenizer, requests, seconds, warmup, free_output, closed_loop,
            processes, timeout, early_stop, seed, quantiles, records, format, arrivals, api_key, as_json,
        )  # fmt: skip
    failures = kept.failures()
    if not step.untrusted and not any(one.metric == "error_rate" for one in slos):
        usual = _slos(["error_rate=1%"])
        if missed := tuple(one.miss(step.metrics) for one in usual if one.miss(step.metrics)):
            slos, step = (*slos, *usual), replace(step, slo_misses=(*step.slo_misses, *missed))
    if as_json:
        typer.echo(json.dumps(_plain(step) | {"failures": failures}, indent=2))
    else:
        typer.echo("\n".join(_page(step, slos, failures, _whole(step, kept))))
    if step.untrusted:
        raise typer.Exit(_UNTRUSTED)
    if step.slo_misses:
        raise typer.Exit(_MISSED)


def _run(
    url: str, trace_file: Path, load: float, model: str, slos: tuple[Slo, ...], tokenizer: str, requests: int | None,
    seconds: float | None, warmup: float, free_output: bool, closed_loop: int, processes: int | None, timeout: float,
    early_stop: bool, seed: int, quantiles: tuple[float, ...], records: Path | None, format: str, arrivals: str | None,
    api_key: str, quiet: bool,
) -> tuple[Step, Records]:  # fmt: skip
    import tempfile

    from tuner.engines.protocol import Cancelled, Endpoint, StepPlan
    from tuner.load import windows
    from tuner.load.formats import read_with_report
    from tuner.load.records import check_writable, read
    from tuner.load.step import measure
    from tuner.load.windows import MAX_SPAN_S
    from tuner.load.wire import checked_key

    trace, report = read_with_report(trace_file, format, arrivals=arrivals, tokenizer=tokenizer or None, seed=seed)
    for message in report.messages():
        typer.echo(message, err=True)
    if seconds is not None:
        trace = windows.cut_time(trace, 0.0, seconds, name=trace.name)
    if requests is not None:
        trace = windows.cut(trace, 0, requests, name=trace.name)
    if not 0 <= warmup <= MAX_SPAN_S or not 0 < timeout <= MAX_SPAN_S or closed_loop < 0:
        raise UsageError("--warmup, --timeout and --closed-loop cannot be negative, or longer than 30 years")
    if processes is not None and processes < 1:
        raise UsageError("--processes must be at least 1")
    if records is not None:
        check_writable(records)
    with tempfile.TemporaryDirectory() as folder:
        plan = StepPlan(
            load=load,
            trace=trace,
            window=trace.name,
            slos=slos,
            records=records or Path(folder) / "records.parquet",
            warmup_s=warmup,
            output="free" if free_output else "forced",
            seed=seed,
            request_timeout_s=timeout,
            early_stop=early_stop,
            quantiles=quantiles,
            on_event=_Progress(quiet),
        )
        with stopping(plan.cancel):
            try:
                step = measure(
                    Endpoint(url, model, checked_key(api_key, "--api-key"), tokenizer),
                    plan,
                    concurrency=closed_loop,
                    shards=processes,
                )
                return step, read(plan.records)
            except (Cancelled, KeyboardInterrupt) as end:
                begun = "" if isinstance(end, Cancelled) else ", if the replay had begun,"
                where = f"; the records until then{begun} are in {records}" if records else ""
                typer.echo(f"interrupted{where}", err=True)
                raise typer.Exit(130) from None


def _again(records: Path | None, slos: tuple[Slo, ...], quantiles: tuple[float, ...]) -> tuple[Step, Records]:
    """A step from its records file alone."""
    from tuner.load.records import read
    from tuner.load.step import judge

    if records is None:
        raise UsageError("--recompute needs --records FILE")
    kept = read(records)
    return judge(kept, slos, quantiles), kept


def _slos(texts: list[str] | tuple[str, ...]) -> tuple[Slo, ...]:
    from tuner.spec.slo import parse

    try:
        return tuple(parse(text) for text in texts)
    except ValueError as error:
        raise UsageError(str(error), where="--slo") from error


def _quantiles(percentiles: list[float] | None) -> tuple[float, ...]:
    for value in percentiles or ():
        if not 0 < value < 100:
            raise UsageError(f"percentile {value:g} is not between 0 and 100", where="--percentile")
    return tuple(round(value / 100, 9) for value in percentiles or (50.0, 90.0, 95.0, 99.0))


class _Progress:
    """One changing line on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()

    def __call__(self, name: str, data: Any) -> None:
        if name == "note":
            typer.echo(data["text"], err=True)
        elif name == "progress" and not self._quiet:
            end = "" if data["done"] < data["total"] else "\r\x1b[K"
            text = f"{data['done']:,} of {data['total']:,} requests, {data['elapsed_s']:.0f} s"
            print(f"\r\x1b[K{text}, about {data['remaining_s']:.0f} s left{end}", end="", file=sys.stderr, flush=True)


def _plain(step: Step) -> dict[str, Any]:
    """JSON-ready: numbers that JSON does not know (infinity) become null."""
    return {
        "load": step.load,
        "window": step.window,
        "metrics": {name: _finite(value) for name, value in step.metrics.items()},
        "intervals": {name: [_finite(low), _finite(high)] for name, (low, high) in step.intervals.items()},
        "slo_misses": list(step.slo_misses),
        "untrusted": list(step.untrusted),
        "stopped_early": step.stopped_early,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _whole(step: Step, records: Records) -> Mapping[str, float]:
    """The rates of which those within SLO are a part."""
    from tuner.measure.metrics import answered

    return answered(records) if "goodput_window_s" in step.metrics else step.metrics


def _page(step: Step, slos: tuple[Slo, ...], failures: Mapping[str, int], whole: Mapping[str, float]) -> list[str]:
    from tuner.measure.server import in_words

    m, lines = step.metrics, []
    closed = m.get("closed_loop_concurrency")
    loop = f", CLOSED LOOP with {closed:.0f} in flight: latencies leave out waiting at a given rate" if closed else ""
    lines.append(f"{step.window} at load {step.load:g}{loop}")
    lines.append(
        f"{m['measured_requests']:,.0f} requests measured over {m['duration_s']:.1f} s, {m['cut_requests']:,.0f} cut "
        f"as warm-up, ramp or tail; {m.get('error_rate', 0):.2%} failed"
    )
    lines += [f"failed: {count:,} x {error}" for error, count in [*failures.items()][:3]]
    if len(failures) > 3:
        lines.append(f"failed: {sum([*failures.values()][3:]):,} x otherwise, in {len(failures) - 3} more ways")
    if m["measured_requests"]:
        lines += ["", *_latencies(step), "", *_rates(step, whole)]
    if (share := m.get("kernel_stamped_share", 1.0)) < 1:
        lines += [f"arrival times: the kernel's for {share:.1%} of the reads, else when this client read"]
    if said := in_words(m):
        lines += [f"server: {said}"]
    if abs((share := m.get("input_share", 1.0)) - 1) > _PROMPTS_OFF:
        lines += [f"prompts: {share:.0%} of the trace's tokens, by the server's count"]
    if step.stopped_early:
        lines += ["", f"stopped early: {step.stopped_early}"]
    for slo in slos:
        miss = slo.miss(m)
        undecided = any(reason.startswith(f"undecided: {slo},") for reason in step.untrusted)
        lines.append(f"SLO {slo}: {'undecided' if undecided else 'missed, ' + miss if miss else 'held'}")
    lines += [f"UNTRUSTED: {reason}" for reason in step.untrusted]
    return lines


def _latencies(step: Step) -> list[str]:
    m = step.metrics
    labels = [name[5:-2] for name in m if name.startswith("ttft_") and name.endswith("_s")]
    rows = [f"{'ms':14}" + "".join(f"{label:>11}" for label in labels) + "   95 % interval of " + labels[-3]]
    names = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end to end", "norm_latency": "per token"}
    for latency, name in names.items():
        cells = "".join(f"{_ms(m.get(f'{latency}_{label}_s')):>11}" for label in labels)
        low, high = step.intervals.get(f"{latency}_{labels[-3]}_s", (math.nan, math.nan))
        bounds = (
            ""
            if math.isnan(low)
            else f"   {_ms(low)} to {_ms(high) if math.isfinite(high) else '? (too few requests)'}"
        )
        rows.append(f"{name:14}{cells}{bounds}")
    return rows


def _rates(step: Step, whole: Mapping[str, float]) -> list[str]:
    m = step.metrics
    offered = m.get("offered_requests_per_s", 0.0)
    return [
        f"{name:22}{whole.get(key, 0):12,.2f} /s{'':4}within SLO {m.get('goodput_' + key, 0):12,.2f} /s"
        for name, key in (
            ("requests", "requests_per_s"),
            ("output tokens", "output_tokens_per_s"),
            ("input + output tokens", "total_tokens_per_s"),
        )
    ] + [f"{'offered':22}{offered:12,.2f} /s" if math.isfinite(offered) else f"{'offered':22}{'all at once':>15}"]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return "inf" if math.isinf(seconds) else f"{seconds * 1e3:,.2f}"
