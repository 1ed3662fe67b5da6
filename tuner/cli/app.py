"""The `tuner` command. Every command imports what it needs when it runs, so that `tuner --help` is instant."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import replay as replay_command
from tuner.cli import trace as trace_command
from tuner.cli.signals import as_interrupts
from tuner.errors import EnvironmentFault, TunerError, UsageError, printable

app = typer.Typer(
    name="tuner",
    help="Find the cheapest way to serve your model fast enough.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="A study file, or a study folder.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tuner {version('tuner')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the cheapest way to serve your model fast enough."""


@app.command(rich_help_panel="Tune")
def tune(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="A study file; run it again to resume.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder or id: instead of a study file, or over its own.")] = "",
    trace: Annotated[
        Path | None, typer.Option(help="The traffic to tune for: a file, or azure-conversation (made up).")
    ] = None,
    slo: Annotated[list[str] | None, typer.Option(help="An SLO, for example ttft_p99=500ms; may be repeated.")] = None,
    gpu_price: Annotated[float | None, typer.Option(help="USD per GPU-hour (per server-hour on CPUs).")] = None,
    budget: Annotated[str, typer.Option(help="When to stop: 4h, '20 launches' or 15usd.")] = "",
    objective: Annotated[
        str, typer.Option(help="chat, code-completion (low latency), rag, batch (throughput), or a file.")
    ] = "",
    space: Annotated[str, typer.Option(help="A search space: vllm/quick, ..., or a file.")] = "",
    sampler: Annotated[str, typer.Option(help="auto, gp, tpe, nsga2, random or grid.")] = "",
    engine: Annotated[str, typer.Option(help="vllm, sglang, command, attach, function, emulator or own.")] = "",
    name: Annotated[str, typer.Option(help="The study's name; its folder is reports/NAME.")] = "",
    parallel: Annotated[str, typer.Option(help="Trials at once, or auto: as many as fit.")] = "",
    storage: Annotated[
        str, typer.Option(help="A database that several tuners share, as a URL (default: $TUNER_STORAGE).")
    ] = "",
    reports: Annotated[str, typer.Option(help="Where study folders are kept.")] = "",
    executor: Annotated[str, typer.Option(help="Where trials run: local, or ray.")] = "",
    address: Annotated[str, typer.Option(help="The Ray cluster; auto: the one that this machine belongs to.")] = "",
    plain: Annotated[bool, typer.Option(help="Plain lines instead of the live view.")] = False,
    python: Annotated[str, typer.Option(help="The interpreter that has the engine, if not beside tuner.")] = "",
    verify_share: Annotated[
        float | None, typer.Option(help="Share of the budget kept for verification (default: the study's, or 0.3).")
    ] = None,
) -> None:
    """Search, launch, measure: end with a front, a best-config YAML, a report and an MLflow study."""
    from tuner.cli import tune as command

    flags = command.Flags(
        model,
        trace,
        tuple(slo or ()),
        gpu_price,
        budget,
        objective,
        space,
        sampler,
        engine,
        name,
        parallel,
        storage,
        reports,
        executor,
        address,
        verify_share,
        python,
    )
    raise typer.Exit(command.run(study, flags, plain))


@app.command(rich_help_panel="Tune")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("study.yaml"),
    model: Annotated[str, typer.Option(help="A model folder or id.")] = "",
    trace: Annotated[str, typer.Option(help="The traffic to tune for.")] = "",
    force: Annotated[bool, typer.Option(help="Write over an existing file.")] = False,
) -> None:
    """Write a commented study file."""
    from tuner.cli import init as command

    command.run(path, model, trace, force)


@app.command(rich_help_panel="Tune")
def check(study: StudyArgument, json: Json = False) -> None:
    """Validate a study and print what would run, without launching anything."""
    from tuner.cli import check as command

    command.run(study, json)


@app.command(rich_help_panel="Tune")
def plan(study: StudyArgument, json: Json = False) -> None:
    """What is feasible, the predicted front, how long and how expensive the study will be."""
    from tuner.cli import plan as command

    command.run(study, json)


@app.command(rich_help_panel="Read")
def front(study: StudyArgument, json: Json = False) -> None:
    """The Pareto front of cost against latency."""
    from tuner.cli import read as command

    raise typer.Exit(command.front(study, json))


@app.command(rich_help_panel="Read")
def show(study: StudyArgument, number: Annotated[int, typer.Argument(metavar="N")], json: Json = False) -> None:
    """One trial: its configuration, its ladder, or why it failed."""
    from tuner.cli import read as command

    command.show(study, number, json)


@app.command(rich_help_panel="Read")
def report(
    study: StudyArgument,
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: report.html in the study folder).")] = None,
) -> None:
    """Make the offline HTML report again from the study folder."""
    from tuner.cli import read as command

    command.report(study, out)


@app.command(rich_help_panel="Read")
def ui(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """MLflow's UI on the study's store."""
    from tuner.cli import read as command

    raise typer.Exit(command.ui(study, port))


@app.command(rich_help_panel="Deploy")
def export(
    study: StudyArgument,
    form: Annotated[str, typer.Option("--format", help="vllm, compose, k8s or helm.")] = "vllm",
    trial: Annotated[int | None, typer.Option(help="Another trial than the recommended one.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to (default: the study's, or the trial's).")
    ] = None,
) -> None:
    """Write the best configuration for deployment."""
    from tuner.cli import read as command

    command.export(study, form, out, trial)


@app.command(rich_help_panel="Deploy")
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An exported best-config.yaml, or its folder.")],
    study: Annotated[Path | None, typer.Option(help="The study's folder (default: the file's).")] = None,
    minutes: Annotated[float, typer.Option(help="A second launch only in the first half of this time.")] = 10.0,
    json: Json = False,
) -> None:
    """Launch an exported configuration and say whether its promise still holds (exit code 3 where not)."""
    from tuner.cli import certify as command

    raise typer.Exit(command.verify(file, study, minutes, json))


@app.command(rich_help_panel="Deploy")
def ablate(
    study: StudyArgument,
    launches: Annotated[int, typer.Option(help="Launches it may take, at least 10.")] = 12,
    json: Json = False,
) -> None:
    """Set back each flag of the recommendation, and recommend only those proven to earn their place."""
    from tuner.cli import certify as command

    raise typer.Exit(command.ablate(study, launches, json))


@app.command(rich_help_panel="Deploy")
def fleet(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Studies that hold the same SLOs.")],
    demand: Annotated[
        Path,
        typer.Option(help="Requests/s per hour (CSV with the columns hour and requests_per_s, or JSON), or a trace."),
    ],
    scale: Annotated[float, typer.Option(help="Factor on the demand.")] = 1.0,
    peak_rps: Annotated[float | None, typer.Option(help="Requests/s of the busiest hour.")] = None,
    swing: Annotated[
        float | None, typer.Option(help="How much the rate varies within an hour: 0.1 is 10 % (default: the trace's).")
    ] = None,
    spare: Annotated[int, typer.Option(help="Replicas that may be lost at any time.")] = 1,
    lead: Annotated[str, typer.Option(help="How long ahead scaling knows what it needs: 90s, 5min, known.")] = "known",
    min_uptime: Annotated[int, typer.Option(help="Hours for which a replica runs at least.")] = 1,
    hold: Annotated[int, typer.Option(help="Hours for which the fleet keeps what it needed.")] = 0,
    spot: Annotated[float, typer.Option(help="Share of the capacity that may be on spot machines.")] = 0.0,
    spot_price: Annotated[float, typer.Option(help="What they cost, as a share of the price.")] = 0.4,
    interruptions: Annotated[float, typer.Option(help="How often each is taken away, per hour.")] = 0.05,
    max_gpus: Annotated[list[str] | None, typer.Option(help="64, or NAME=64; may be repeated.")] = None,
    routing: Annotated[str, typer.Option(help="random, two-choices or least-loaded.")] = "random",
    confidence: Annotated[
        float, typer.Option(help="How sure it is that a replica has the capacity that is counted on.")
    ] = 0.95,
    simulation: Annotated[str, typer.Option(help="auto, windows or requests.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long the solver may search.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation's random numbers.")] = 0,
    format: Annotated[str, typer.Option(help="The trace's format, where it is not recognised.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="The HTML file (default: fleet.html in the first study's folder).")
    ] = None,
    json: Json = False,
) -> None:
    """The cheapest fleet that holds the SLOs through a day of demand (exit code 3 where none does)."""
    from tuner.cli import fleet as command

    flags = command.Flags(
        demand,
        format,
        scale,
        peak_rps,
        swing,
        spare,
        lead,
        min_uptime,
        hold,
        spot,
        spot_price,
        interruptions,
        tuple(max_gpus or ()),
        routing,
        confidence,
        simulation,
        seconds,
        seed,
    )
    raise typer.Exit(command.run(studies, flags, out, json))


@app.command(rich_help_panel="Read")
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A study file, or a study folder.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The study to compare it with.")],
    json: Json = False,
) -> None:
    """Two studies side by side: versions, GPUs or traces, front against front."""
    from tuner.cli import certify as command

    raise typer.Exit(command.compare(first, second, json))


@app.command(rich_help_panel="Read")
def sync(
    study: StudyArgument,
    to: Annotated[str, typer.Option(metavar="URI", help="Another MLflow store than the study's.")] = "",
) -> None:
    """Log to MLflow what an unreachable server missed."""
    from tuner.cli import read as command

    command.sync(study, to)


@app.command(rich_help_panel="Tune")
def doctor(json: Json = False) -> None:
    """What this machine has and lacks, each with its fix."""
    from tuner.cli import doctor as command

    raise typer.Exit(command.run(json))


app.command("replay", rich_help_panel="Measure")(replay_command.replay)
app.add_typer(
    trace_command.app,
    name="trace",
    help="Look at traces, convert, cut and synthesise them.",
    rich_help_panel="Measure",
)


def main() -> None:
    """Entry point: one clear line and the right exit code instead of a traceback; a bug keeps its traceback."""
    measures = sys.argv[1:2] in (["tune"], ["ablate"], ["verify"], ["replay"])
    code: object = 130 if measures else 0  # where a pipe's reader is gone before the command is done
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks an arrow shows the rest
    try:
        try:
            as_interrupts()
            code = app(standalone_mode=False)
        except TunerError as error:
            code = error.exit_code
            print(f"tuner: {printable(str(error))}", file=sys.stderr)
        except typer.Exit as stop:
            code = stop.exit_code
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except BrokenPipeError:
            raise
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # typer makes a 1 of it
                raise stop.__context__ from None
            raise
        except Exception as error:
            show = getattr(error, "show", None)  # the command line's own errors print their usage
            fault = _fault(error)
            if show is not None:
                code = 2
                show()
            elif fault is not None:
                code = fault.exit_code
                print(f"tuner: {fault}", file=sys.stderr)
            else:
                raise
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough: what is left unwritten must not fail at the exit
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
            os.dup2(nowhere, stream.fileno())
    sys.exit(code if isinstance(code, int) else 0)


_BAD_PATH = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def _fault(error: Exception) -> TunerError | None:
    """What the machine came up with (a full disk, a busy database) in one line; None for a bug of ours."""
    kept = ": every outcome that was written is kept" if sys.argv[1:2] in (["tune"], ["ablate"]) else ""
    again = f"Mend that and run the same command again{kept}"
    if isinstance(error, OSError) and (error.errno or error.filename):  # else (a TimeoutError) nobody's but ours
        where = str(error.filename2 or error.filename or "")
        bad = error.errno in _BAD_PATH
        return (UsageError if bad else EnvironmentFault)(
            error.strerror or _first_line(error), where=where, fix="Give another path" if bad else again
        )
    # by name: whoever raised them has imported them, nobody else should
    if {"StorageInternalError", "SQLAlchemyError"} & {kind.__name__ for kind in type(error).__mro__}:
        return EnvironmentFault(_first_line(getattr(error.__cause__ or error, "orig", None) or error), fix=again)
    return None


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
