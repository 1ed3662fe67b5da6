"""``tuner trace``: look at, convert, cut and make request traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.load.formats import ReadingReport
    from tuner.load.synth import Profile
    from tuner.load.trace import Trace

app = typer.Typer(no_args_is_help=True, help="Look at, convert, cut and make request traces.")

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60

In = Annotated[Path, typer.Argument(help="The trace file.")]
Out = Annotated[Path, typer.Argument(help="The file to write: .jsonl or .parquet.")]
FormatName = Annotated[str, typer.Option("--format", help="The file's format, where it is not recognised.")]
MaxBad = Annotated[
    int | None, typer.Option(min=0, help="Bad lines to skip before giving up. [default: 100, at most 1 in 10]")
]
ArrivalsSpec = Annotated[
    str | None,
    typer.Option("--arrivals", help="Arrivals for a file without: poisson:RATE, gamma:RATE:CV, diurnal:RATE:SWING."),
]
TokenizerPath = Annotated[str | None, typer.Option("--tokenizer", help="Model folder that counts tokens of texts.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same trace.")]
LengthFactor = Annotated[float, typer.Option(help="Multiply prompt and output lengths, for a smaller model.")]
RateFactor = Annotated[float, typer.Option(help="Multiply the arrival rate.")]
MaxInput = Annotated[int | None, typer.Option(help="Cut prompts to so many tokens.")]
MaxOutput = Annotated[int | None, typer.Option(help="Cut outputs to so many tokens.")]


@app.command()
def info(
    file: In,
    format: FormatName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    max_bad: MaxBad = None,
    arrivals: ArrivalsSpec = None,
    tokenizer: TokenizerPath = None,
    seed: Seed = 0,
) -> None:
    """Show a trace's arrival rate and burstiness, its lengths and its prefix sharing, with a picture."""
    trace, report = _read(file, format, max_bad, arrivals, tokenizer, seed)
    if as_json:
        typer.echo(json.dumps(_facts(trace, report), ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(_page(trace, report)))


@app.command()
def convert(
    file: In,
    out: Out,
    format: FormatName = "auto",
    max_bad: MaxBad = None,
    arrivals: ArrivalsSpec = None,
    tokenizer: TokenizerPath = None,
    seed: Seed = 0,
    length_factor: LengthFactor = 1.0,
    rate_factor: RateFactor = 1.0,
    max_input_tokens: MaxInput = None,
    max_output_tokens: MaxOutput = None,
) -> None:
    """Write a trace of any format as .jsonl or .parquet, scaled to a smaller model where asked."""
    trace, _ = _read(file, format, max_bad, arrivals, tokenizer, seed)
    _write(_scaled(trace, length_factor, rate_factor, max_input_tokens, max_output_tokens), out)


@app.command()
def cut(
    file: In,
    out: Annotated[Path, typer.Argument(help="The file to write; a folder with --search and --held-out.")],
    from_s: Annotated[float | None, typer.Option(help="Window by time: its start, in seconds.")] = None,
    to_s: Annotated[float | None, typer.Option(help="Window by time: its end, in seconds (not included).")] = None,
    first: Annotated[int | None, typer.Option(min=0, help="Window by count: its first request, from 0.")] = None,
    count: Annotated[int | None, typer.Option(help="Window by count: how many requests.")] = None,
    search: Annotated[int | None, typer.Option(help="Split: how many windows to search with.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Split: how many windows to verify with.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Split into equal parts of requests (count) or of time (time). [default: count]")
    ] = None,
    max_requests: Annotated[int | None, typer.Option(help="Split: at most so many requests per window.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Split: at most so many seconds per window.")] = None,
    format: FormatName = "auto",
    max_bad: MaxBad = None,
    arrivals: ArrivalsSpec = None,
    tokenizer: TokenizerPath = None,
    seed: Seed = 0,
) -> None:
    """Cut one window by time or by count, or split a trace into search and held-out windows that never overlap."""
    from tuner.load import windows

    by_time, by_count = from_s is not None or to_s is not None, first is not None or count is not None
    splits = search is not None or held_out is not None
    if by_time + by_count + splits != 1:
        raise UsageError(
            "say which window to cut",
            fix="Give --from-s and --to-s, or --first and --count, or --search and --held-out",
        )
    if not splits:
        _count_only("with --search or --held-out", by=by, max_requests=max_requests, max_seconds=max_seconds)
    trace, _ = _read(file, format, max_bad, arrivals, tokenizer, seed)
    if by_time:
        start_s = from_s or 0.0
        _write(windows.cut_time(trace, start_s, float("inf") if to_s is None else to_s), out)
        silent_s = float(trace.arrival_s[trace.arrival_s >= start_s][0]) - start_s
        if silent_s >= 0.1:
            typer.echo(
                f"No request came in the first {silent_s:.1f} s of the window: the file begins after them", err=True
            )
    elif by_count:
        start = first or 0
        _write(windows.cut(trace, start, len(trace) if count is None else start + count), out)
    else:
        by = by or "count"
        if by not in ("count", "time"):
            raise UsageError(f"cannot split by {by!r}", fix="Use --by count or --by time")
        parts = windows.split(
            trace,
            search=1 if search is None else search,
            held_out=1 if held_out is None else held_out,
            by=by,  # type: ignore[arg-type]
            max_requests=max_requests,
            max_seconds=max_seconds,
        )
        _make_folder(out)
        for window in (*parts.search, *parts.held_out):
            _write(window, out / f"{window.name.rpartition('/')[2]}.parquet")


@app.command()
def synth(
    out: Out,
    profile: Annotated[str | None, typer.Option(help="Built-in: azure-conversation or azure-code.")] = None,
    fit: Annotated[Path | None, typer.Option(help="A trace to fit the synthesis to.")] = None,
    rates: Annotated[Path | None, typer.Option(help="A ServeGen rate profile for the arrivals.")] = None,
    from_s: Annotated[float | None, typer.Option(help="With --rates: start of the part to take, in seconds.")] = None,
    to_s: Annotated[float | None, typer.Option(help="With --rates: its end, in seconds.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many requests.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Or: for how many seconds.")] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(help="poisson:RATE, gamma:RATE:CV, diurnal:RATE:SWING:PERIOD_S; with --fit also the bare names."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="With --fit: empirical or lognormal. [default: empirical]")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of prompt tokens that repeat earlier prompts, 0 to 1.")
    ] = None,
    prefix_groups: Annotated[
        int | None, typer.Option(help="With --share: how many different shared prefixes. [default: 20]")
    ] = None,
    prefix_block_tokens: Annotated[
        int | None, typer.Option(help="With --share: tokens per block of a shared prefix. [default: 16]")
    ] = None,
    seed: Seed = 0,
    length_factor: LengthFactor = 1.0,
    rate_factor: RateFactor = 1.0,
    max_input_tokens: MaxInput = None,
    max_output_tokens: MaxOutput = None,
    format: FormatName = "auto",
    max_bad: MaxBad = None,
    tokenizer: TokenizerPath = None,
) -> None:
    """Make a trace: Poisson, Gamma or diurnal arrivals; lengths and prefixes as in a trace or a built-in profile."""
    from dataclasses import replace

    import numpy as np

    from tuner.load import synth as synthesis
    from tuner.load.arrivals import Arrivals
    from tuner.load.rates import read_rates
    from tuner.load.sharing import sharing

    bare = arrivals in ("poisson", "gamma", "diurnal")
    if (profile is None) == (fit is None):
        raise UsageError("say what the trace should be like", fix="Give either --profile or --fit TRACE")
    if fit is None:
        _count_only("with --fit", lengths=lengths, tokenizer=tokenizer, format=None if format == "auto" else format)
    if rates is None:
        _count_only("with --rates", from_s=from_s, to_s=to_s)
    else:
        _count_only("without --rates, which takes --from-s and --to-s", duration_s=duration_s)
    if share is None:
        _count_only("with --share", prefix_groups=prefix_groups, prefix_block_tokens=prefix_block_tokens)
    chosen: Profile
    if fit is not None:
        process = arrivals if arrivals is not None and not bare else None
        source, _ = _read(fit, format, max_bad, process, tokenizer, seed)
        chosen = synthesis.fit(source, how=lengths or "empirical", kind=arrivals if bare and arrivals else "gamma")
    else:
        chosen = synthesis.profile(profile or "")
    if arrivals is not None and not (bare and fit is not None):
        chosen = replace(chosen, arrivals=Arrivals.parse(arrivals))
    if share is not None:
        said = {"groups": prefix_groups, "block_tokens": prefix_block_tokens}
        said = {name: value for name, value in said.items() if value is not None}
        chosen = replace(chosen, prefixes=synthesis.Prefixes(share, **said))
    if rates is not None:
        part = read_rates(rates, max_bad=max_bad).between(from_s or 0.0, float("inf") if to_s is None else to_s)
        trace = synthesis.with_arrivals(chosen, part.times(np.random.default_rng(seed))[:requests], seed=seed)
    else:
        trace = synthesis.synthesise(chosen, requests=requests, duration_s=duration_s, seed=seed)
    if chosen.prefixes is not None and (found := sharing(trace).token_share) < chosen.prefixes.share - 0.01:
        typer.echo(
            f"{found:.0%} of the prompt tokens repeat an earlier prompt's, not {chosen.prefixes.share:.0%}: more do not"
            f" where {len(trace)} requests begin with {chosen.prefixes.groups} prefixes (--prefix-groups)",
            err=True,
        )
    _write(_scaled(trace, length_factor, rate_factor, max_input_tokens, max_output_tokens), out)


def _count_only(when: str, **options: object) -> None:
    """UsageError for an option that was given and would change nothing."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} only counts {when}", fix="Leave it out, or give what it needs"
            )


def _read(
    file: Path, format: str, max_bad: int | None, arrivals: str | None, tokenizer: str | None, seed: int
) -> tuple[Trace, ReadingReport]:
    from tuner.load.formats import read_with_report

    trace, report = read_with_report(file, format, max_bad=max_bad, arrivals=arrivals, tokenizer=tokenizer, seed=seed)
    for message in report.messages():
        typer.echo(message, err=True)
    return trace, report


def _scaled(trace: Trace, length: float, rate: float, max_input: int | None, max_output: int | None) -> Trace:
    if (length, rate, max_input, max_output) == (1.0, 1.0, None, None):
        return trace
    from tuner.load.synth import scale
    from tuner.load.trace import texts_lost

    scaled = scale(trace, length=length, rate=rate, max_input_tokens=max_input, max_output_tokens=max_output)
    for message in texts_lost(trace, scaled):
        typer.echo(message, err=True)
    return scaled


def _write(trace: Trace, out: Path) -> None:
    from tuner.load.tracefile import write

    write(trace, out)
    last_s = float(trace.arrival_s[-1])
    silence = ""
    if trace.lasts_s - last_s >= 0.1:
        silence = f", then none until {trace.lasts_s:.1f} s"
        if out.suffix == ".jsonl":
            silence += ", which .jsonl has no place for (.parquet has)"
    typer.echo(f"{out}: {len(trace)} requests over {last_s:.1f} s{silence}", err=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder cannot be made ({error.strerror})", where=str(folder)) from error


def _facts(trace: Trace, report: ReadingReport) -> dict[str, object]:
    from dataclasses import asdict

    from tuner.load.summary import summarise

    summary = summarise(trace)
    facts = asdict(summary)
    facts["sharing"] |= {"block_share": summary.sharing.block_share, "token_share": summary.sharing.token_share}
    return {"name": trace.name, "format": report.format, **facts, "reading": asdict(report)}


def _page(trace: Trace, report: ReadingReport) -> list[str]:
    from tuner.load.summary import doubling_bins, rate_bins, summarise

    facts = summarise(trace)
    rate = "-" if facts.rate_per_s is None else f"{facts.rate_per_s:.2f} /s"
    cv = "-" if facts.cv is None else f"{facts.cv:.2f}"
    ends = "" if facts.lasts_s is None else f" to the last request, ends at {facts.lasts_s:.1f} s"
    lines = [
        f"{trace.name} ({report.format})",
        f"requests        {facts.requests}",
        f"duration        {facts.duration_s:.1f} s{ends}, longest gap {facts.longest_gap_s:.1f} s",
        f"arrival rate    {rate}, burstiness (CV of the gaps) {cv}",
    ]
    for name, lengths in (("input tokens ", facts.input), ("output tokens", facts.output)):
        lines.append(
            f"{name}   p50 {lengths.p50}, p90 {lengths.p90}, p99 {lengths.p99}, max {lengths.max}, "
            f"mean {lengths.mean:.1f}, total {lengths.total}"
        )
    shared = facts.sharing
    lines.append(
        f"prefix sharing  {shared.block_share:.1%} of blocks ({facts.block_tokens} tokens each) and "
        f"{shared.token_share:.1%} of prompt tokens seen before"
        if shared.blocks
        else "prefix sharing  none known"
    )
    rates, width_s = rate_bins(trace, _WIDTH)
    lines += [
        "",
        f"arrival rate over time (a column is {width_s:.3g} s, the highest {rates.max():.3g} /s)",
        _spark(rates),
    ]
    for name, lengths in (("input tokens", trace.input_tokens), ("output tokens", trace.output_tokens)):
        bins = doubling_bins(lengths)
        most = max(requests for _, _, requests in bins)
        lines += ["", f"requests by {name}"]
        lines += [
            f"{low:>8} to {high:<8} {'█' * round(requests / most * 40) or ('▏' if requests else '')} {requests}"
            for low, high, requests in bins
        ]
    return lines


def _spark(values) -> str:
    """One character per value, its height in eighths of the highest; any value above 0 shows."""
    top = float(values.max()) or 1.0
    return "".join(_BARS[max(round(value / top * 8), 1 if value > 0 else 0)] for value in values)
