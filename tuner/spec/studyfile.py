"""A study file (or the flags of the common case) -> :class:`Study`, every name resolved."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tuner.engines import hub
from tuner.errors import UsageError
from tuner.server.limits import LIMITED
from tuner.space.condition import named
from tuner.space.space import SHARED, SearchSpace, heads
from tuner.spec import facts as facts_
from tuner.spec import shipped, slo
from tuner.spec import storage as storage_
from tuner.spec.objective import Objective, QualityFloor
from tuner.spec.schema import BudgetFile, EngineFile, HardwareFile, ObjectiveFile, StorageFile, StudyFile, TraceFile
from tuner.spec.spacefile import NO_SWITCH, as_before, build, off
from tuner.spec.study import (
    COUNTED,
    FITTING,
    RULES,
    USERS,
    Budget,
    EngineSpec,
    ExecutorSpec,
    HardwareSpec,
    LoadSpec,
    Rows,
    Study,
    TraceSpec,
)
from tuner.spec.text import Document, check_env, check_flags, read, suggest, twice, validate

MOST_WINDOWS, MOST_TOKENS = 1_000, 10_000_000
USUAL_LADDER = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # until the ladder is settled, or where nobody can ask
_ROWS = "write rows like those of tuner/search/gpus.yaml into a file, and name it: hardware: {table: FILE}"
_DURATION = re.compile(r"^\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(s|min|m|h|d)?\s*$")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


def seconds(text: str | float | int) -> float:
    """``90s``, ``5min``, ``4h`` or a number of seconds. Raises ``ValueError``."""
    match = _DURATION.match(str(text))
    if not match or not 0 < float(match.group(1)) < math.inf:
        raise ValueError(f"bad duration {text!r}: write for example 30s, 5min or 4h")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def load(path: Path) -> Study:
    """Reads and resolves a study file, or the ``study.yaml`` of a study folder. Raises UsageError with file:line."""
    if path.is_dir():
        path = path / "study.yaml"
    return resolve(read(path, "study"), path.parent)


def resolve(document: Document, beside: Path) -> Study:
    """A study document as a :class:`Study`; relative paths are relative to ``beside``."""
    file = validate(StudyFile, document)
    frozen = dict(document.data["frozen"]) if file.frozen else {}
    if frozen and document.tree is not None and Path(document.path).name != "study.yaml":
        raise document.error(
            "a copy of a study folder's own file", ("frozen",), "name the folder, or take 'frozen' out to begin anew"
        )
    base = Path(frozen.get("beside", beside)).resolve()
    trace = _trace(file.trace, document, base, file.engine.kind, must_exist=not frozen)
    engine = _engine(file.engine, document, base, must_exist=not frozen)
    model = (
        ""
        if not file.model and engine.kind == "function"
        else _model(file.model, document, base, must_exist=not frozen)
    )
    own = () if frozen else _rows(file.hardware, document, base)
    facts = frozen.get("facts") or _facts(file, document, base, model, engine, trace, own)
    if frozen and FITTING not in frozen:
        facts = {name: fact for name, fact in facts.items() if name != "fewest_gpus"}
    hardware = HardwareSpec(**frozen["hardware"]) if frozen else _hardware(facts, own)
    space = _with_args(_space(file, document, base, facts), engine, file, document)
    settled = facts if frozen else {**facts, **facts_.of_flags(space.fixed, facts)}
    if settled != facts:  # by the space's own flags: its conditions are to see that
        facts = settled
        space = _with_args(_space(file, document, base, facts), engine, file, document)
    if space.engine != engine.kind and engine.kind in ("vllm", "sglang"):
        raise document.error(
            f"the search space {space.name!r} is for {space.engine}, the study's engine is {engine.kind}",
            ("search_space",),
        )
    gpus = {space.gpu, *(emission.gpu for p in space.parameters for emission in p.emissions)}
    objective = _objective(file, document, base, hardware, frozen, gpus)
    name = file.name or (Path(document.path).stem if document.tree is not None else Path(model).name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise document.error(f"bad study name {name!r}", ("name",), "use letters, digits, '.', '_' and '-'")
    folder = str(beside) if frozen else str(Path(file.reports) / name)
    least = _least(space, model)
    if least > hardware.gpus and _executor(file).kind == "local":  # a cluster may get a larger node
        said = next((flag for flag in engine.args if flag in space.sized), "")
        begun = (
            f"; to continue the study that was begun, name {folder}" if (Path(folder) / "study.yaml").is_file() else ""
        )
        document.refuse(
            f"every server takes {least} GPUs, the study has {hardware.gpus}",
            ("engine", "args", said) if said else ("parameters",),
            f"write hardware: {{gpu: NAME, gpus: {least}}}, or let it take fewer{begun}",
        )
    warmup_s = _seconds(file.load.warmup, document, ("load", "warmup"), zero=True)
    for index, earlier in enumerate(file.warm_start):
        if not (base / earlier / "study.yaml").is_file():
            document.refuse(f"warm_start: no study in {earlier}", ("warm_start", index), "name a study folder")
    if trace.file and warmup_s >= trace.window_s:
        document.refuse(
            f"the warm-up ({warmup_s:g} s) leaves nothing of a window of {trace.window_s:g} s",
            ("load", "warmup") if "load" in document.data else ("trace", "window"),
            "warm up for less, or measure for longer",
        )
    if isinstance(file.parallel, int) and file.parallel < 1:
        document.refuse(f"parallel is 1 or more, not {file.parallel}", ("parallel",), "or auto: as many as fit")
    if _no_store(file.tracking_uri):
        document.refuse(
            f"MLflow keeps no runs in files any more, as tracking_uri {file.tracking_uri} asks for",
            ("tracking_uri",),
            "write sqlite:///mlflow.db, or a server's http://HOST:5000",
        )
    budget = _budget(file.budget, document)
    resolved = {
        "beside": str(base.resolve()),
        "facts": dict(facts),
        "hardware": {name: value for name, value in asdict(hardware).items() if name != "rows"},
        "price_usd_per_gpu_hour": objective.price_usd_per_gpu_hour,
    }
    if hardware.rows:
        resolved["hardware"]["rows"] = list(hardware.rows)
    resolved |= {rule: True for rule in RULES if not frozen or rule in frozen}
    if "ladder" in frozen:
        resolved["ladder"] = frozen["ladder"]  # it was left to the tuner, and is settled
    whole = {**document.data, "name": name, "frozen": resolved}
    for key, said in (("search_space", _space_name(file, facts)), ("objective", file.objective)):
        whole[key] = _part(key, said, document, base)[0]
    if file.storage:
        whole["storage"] = storage_.kept(document.data["storage"])
    return Study(
        name=name,
        folder=folder,
        source=document.path,
        model=model,
        engine=engine,
        hardware=hardware,
        space=space,
        objective=objective,
        trace=trace,
        load=LoadSpec(
            USUAL_LADDER if file.load.ladder == "auto" else tuple(file.load.ladder),
            warmup_s,
            _seconds(file.load.request_timeout, document, ("load", "request_timeout")),
            file.load.early_stop,
            file.load.ladder == "auto",
        ),
        budget=budget,
        predictor=file.predictor,
        sampler=file.sampler,
        seed=file.seed,
        parallel=_parallel(file),
        executor=_executor(file),
        warm_start=tuple(file.warm_start),
        tracking_uri=file.tracking_uri,
        storage=_storage(file.storage, document),
        frozen=whole,
    )


def _seconds(text: str | float, document: Document, at: tuple[str, ...], zero: bool = False) -> float:
    if zero and text in (0, "0", "0s"):
        return 0.0
    try:
        return seconds(text)
    except ValueError as error:
        raise document.error(f"{'.'.join(at)}: {error}", at) from None


def by(rules: frozenset[str], study: Study) -> Study:
    """``study`` by ``rules`` (:attr:`Study.rules`), those of a folder or of a shared study."""
    if study.rules == rules:
        return study
    resolved = {name: value for name, value in study.frozen["frozen"].items() if name not in RULES}
    frozen = {**study.frozen, "frozen": resolved | dict.fromkeys(sorted(rules), True)}
    if {COUNTED, FITTING} & (study.rules ^ rules):
        again = resolve(Document(study.source, frozen), Path(study.folder))
        study = replace(study, space=again.space, engine=again.engine)
    return replace(study, frozen=frozen)


def _storage(file: StorageFile | str, document: Document) -> storage_.StorageSpec:
    spec = StorageFile(url=file) if isinstance(file, str) else file
    heartbeat_s = _seconds(spec.heartbeat, document, ("storage", "heartbeat"))
    return storage_.storage(spec.url, heartbeat_s, _seconds(spec.grace, document, ("storage", "grace")), document)


def _no_store(uri: str) -> bool:
    """Whether ``uri`` names a folder, which MLflow 3 only takes where it is told to."""
    told = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    folder = uri.startswith("file:") or (":" not in uri and not uri.startswith("databricks"))
    return bool(uri) and not told and folder


def _budget(file: BudgetFile | str | int, document: Document) -> Budget:
    """``4h``, ``20 launches`` (or ``20``), ``15 usd`` or a mapping of the three."""
    if isinstance(file, str | int):
        try:
            return parse_budget(str(file))
        except ValueError as error:
            document.refuse(str(error), ("budget",))
            return Budget()  # of nan or inf: it limits nothing
    for key in ("launches", "hours", "usd"):
        value = getattr(file, key)
        if value is not None and not 0 < value < math.inf:
            document.refuse(f"budget.{key} must be a number above zero, not {value}", ("budget", key))
    if not 0 <= file.verify_share < 1:
        raise document.error("budget.verify_share is a share from 0 to below 1", ("budget", "verify_share"))
    launches = file.launches if (file.launches or file.hours or file.usd) else 20
    return Budget(launches, file.hours, file.usd, file.verify_share, _min_gain(file.min_gain, document))


def _min_gain(said: str | float, document: Document) -> float:
    """``0.3%`` or ``0.003``."""
    at, word = ("budget", "min_gain"), str(said).strip()
    try:
        found = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        found = math.nan
    if not 0 <= found < 1:
        raise document.error(f"budget.min_gain is a share such as 0.3%, from 0 to below 1, not {said}", at)
    if found > 0.1 and not word.endswith("%"):
        document.refuse(f"budget.min_gain: {word} is {found:.0%} of the front", at, f"write for example {word}%")
    return found


def parse_budget(text: str) -> Budget:
    """``4h``, ``90min``, ``20`` or ``20 launches``, ``15usd``. Raises ``ValueError``."""
    word = text.strip().lower()
    for ending, key in (("launches", "launches"), ("launch", "launches"), ("usd", "usd"), ("$", "usd")):
        if word.endswith(ending):
            word, kind = word.removesuffix(ending).strip(), key
            break
    else:
        kind = "launches" if re.fullmatch(r"[0-9.]+", word) else "hours"
    try:
        value = seconds(word) / 3600 if kind == "hours" else float(word)
        if not 0 < value < math.inf or (kind == "launches" and not value.is_integer()):
            raise ValueError
    except ValueError:
        raise ValueError(f"bad budget {text!r}: write for example 4h, '20 launches' or 15usd") from None
    if kind == "launches":
        return Budget(launches=int(value))
    return Budget(hours=value) if kind == "hours" else Budget(usd=value)


NO_TRACE = (
    "Give a log of your traffic, or make one like Azure's: "
    "tuner trace synth trace.parquet --profile azure-conversation --duration-s 3600"
)


def _trace(file: TraceFile | str, document: Document, base: Path, kind: str, must_exist: bool) -> TraceSpec:
    if not file:
        if kind != "function":
            raise document.error("trace is missing", (), "add trace: FILE, the traffic to tune for")
        return TraceSpec("", window_s=1.0, search_windows=1, heldout_windows=1)
    spec = TraceFile(file=file) if isinstance(file, str) else file
    at = ("trace",) if isinstance(file, str) else ("trace", "file")
    path = Path(os.path.normpath(base / spec.file))
    if must_exist and not os.path.isfile(path):
        near = suggest(path.name, [p.name for p in path.parent.glob("*")] if os.path.isdir(path.parent) else [])
        fix = near if near.startswith("Did you mean") else NO_TRACE
        raise document.error(f"no such trace file: {spec.file}", at, fix)
    heldout = None if spec.heldout_windows == "auto" else spec.heldout_windows
    if not 1 <= spec.search_windows <= MOST_WINDOWS or not 0 <= (heldout or 0) <= MOST_WINDOWS:
        raise document.error(
            f"a study has 1 to {MOST_WINDOWS} search windows, and as many held out at most", ("trace",)
        )
    for key in ("max_input_tokens", "max_output_tokens"):
        most = getattr(spec, key)
        if most is not None and not 1 <= most <= MOST_TOKENS:
            document.refuse(f"trace.{key} is from 1 to {MOST_TOKENS:,}, not {most}", ("trace", key))
    return TraceSpec(
        str(path),
        spec.format,
        _seconds(spec.window, document, ("trace", "window")),
        spec.search_windows,
        heldout,
        spec.max_input_tokens,
        spec.max_output_tokens,
        spec.output,
        None if spec.fill_cache == "auto" else _seconds(spec.fill_cache, document, ("trace", "fill_cache"), zero=True),
    )


def _executor(file: StudyFile) -> ExecutorSpec:
    said = file.executor
    return ExecutorSpec(kind=said) if isinstance(said, str) else ExecutorSpec(**said.model_dump())


def _parallel(file: StudyFile) -> int:
    """Trials at once; 0: as many as fit, which is what a cluster is for."""
    if file.parallel == "auto" or (file.parallel is None and _executor(file).kind == "ray"):
        return 0
    return max(1, file.parallel or 1)


def _engine(file: EngineFile, document: Document, base: Path, must_exist: bool) -> EngineSpec:
    command = tuple(file.command.split()) if isinstance(file.command, str) else tuple(file.command or ())
    python = os.path.normpath(base / file.python) if file.python.startswith(".") else file.python
    check_flags(file.args, _flag, document, ("engine", "args"))
    check_env(file.env, document, ("engine", "env"))
    flag = _flag_before if as_before(document) else _flag
    args = {flag(name): value for name, value in file.args.items()}
    env = {name: str(value) for name, value in file.env.items()}
    said = {key: value for key in ("target", "url", "gpu") if (value := getattr(file, key))}
    options = {**said, **file.options}
    if isinstance(variants := options.get("variants"), dict):
        at = ("engine", "options", "variants")
        options["variants"] = {
            name: _model(given, document, base, must_exist, *at, name) if isinstance(given, str) else given
            for name, given in variants.items()
        }
    phases = options.get("phase_limit_s")
    for name in phases if isinstance(phases, dict) and file.kind != "own" else ():
        if name not in LIMITED:
            at = ("engine", "options", "phase_limit_s", name)
            document.refuse(f"phase_limit_s: there is no phase {name!r}", at, suggest(name, LIMITED))
    if isinstance(tokenizer := options.get("tokenizer"), str) and tokenizer.startswith("."):
        options["tokenizer"] = os.path.normpath(base / tokenizer)
    return EngineSpec(file.kind, command, python, args, env, file.trust_remote_code, options)


def _flag(name: str) -> str:
    """Under the engine's name; a part of a JSON value (``compilation-config.cudagraph_mode``) as it stands."""
    head, dot, part = name.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + part


def _flag_before(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _model(model: str, document: Document, base: Path, must_exist: bool, *at: str) -> str:
    what, loc = ".".join(at) or "model", at or ("model",)
    if not model:
        raise document.error(f"{what} is missing", at[:-1], f"add {what}: FOLDER or a model id")
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~nobody
        raise document.error(f"{what} {model!r}: {error}", loc, "write the folder out") from None
    looks_like_path = model.startswith((".", "/", "~")) or os.path.isdir(base / path) or model.count("/") > 1
    if not looks_like_path:
        if must_exist and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            raise document.error(
                f"{what} {model!r} is neither a folder nor a model id", loc, "write ./folder or org/name"
            )
        return model
    path = Path(os.path.normpath(base / path))
    if must_exist and not os.path.isfile(path / "config.json"):
        lacks = "has no config.json" if os.path.isdir(path) else "does not exist"
        raise document.error(f"the {what} folder {model} {lacks}", loc, "give a model folder or a model id")
    return str(path)


def _facts(
    file: StudyFile, document: Document, base: Path, model: str, engine: EngineSpec, trace: TraceSpec, own: Rows
) -> dict[str, Any]:
    """Facts of machine, model and trace as they are now; ``own`` rows of the hardware table."""
    from tuner.load import formats

    if engine.kind in hub.SERVED:
        hub.read(model)
    facts = {**facts_.of_machine(), **facts_.of_model(model)}
    for key in ("draft_model", "eagle_model"):
        given = getattr(file, key)
        if given:
            facts[key] = _model(given, document, base, True, key)
    if trace.file:
        try:
            whole = formats.read(Path(trace.file), trace.format, tokenizer=engine.tokenizer(model))
        except UsageError as error:  # one of the trace file's own has its line there
            error.where = error.where or document.where(("trace", "format"))
            raise
        facts |= facts_.of_trace(whole.input_tokens, whole.output_tokens)
    facts |= _gpu_facts(file.hardware, document, engine, _executor(file), own)
    facts |= facts_.of_flags(engine.args, facts)
    if engine.kind in hub.SERVED and facts["platform"] == "cuda":
        from tuner.search import hardware

        row = hardware.lookup(facts["gpu_name"], hardware.table(own))
        facts |= facts_.fewest_gpus(model, row, facts["gpus"], engine, facts)
    return facts


def _gpu_facts(
    file: HardwareFile, document: Document, engine: EngineSpec, executor: ExecutorSpec, own: Rows
) -> dict[str, Any]:
    """Platform and GPU: from the study where it names them (an emulated GPU always is), else from the cluster that it
    runs on, else from this machine."""
    from tuner.search import hardware

    wanted, at = file.gpu, ("hardware", "gpu")
    if executor.kind == "ray" and wanted != "cpu" and "auto" in (wanted, file.gpus):
        from tuner.executor import cluster

        found = cluster.survey(executor.address, "" if wanted == "auto" else wanted, own)
        if found.gpus and wanted == "auto" and engine.kind != "emulator":
            if not found.device:
                raise document.error(
                    "the cluster does not say what its GPUs are", at, "name them: hardware: {gpu: NAME}"
                )
            wanted = found.device
        file = file.model_copy(update={"gpus": max(found.gpus, 1)}) if file.gpus == "auto" else file
    if engine.kind == "emulator":
        if "gpu" in engine.options:
            wanted, at = str(engine.options["gpu"]), ("engine", "options", "gpu")
        elif wanted == "auto":
            wanted = "H100-SXM"
    if wanted == "auto":
        row = hardware.detect(own)[0]
    else:
        row = hardware.cpu() if wanted == "cpu" else hardware.lookup(wanted, hardware.table(own))
        if row is None:
            near = filter(None, (suggest(wanted, hardware.table(own)), _ROWS))
            raise document.error(f"unknown GPU {wanted!r}", at, " Else ".join(near))
    if row is not None and row.kind == "cpu":
        return {"platform": "cpu", "gpus": 0, "gpu_name": row.name}
    here = facts_.of_gpus()
    name, memory_bytes = (row.name, row.memory_bytes) if row else hardware.gpu() or ("", 0)
    gpus = here.get("gpus", 1) if file.gpus == "auto" else int(file.gpus)
    if gpus < 1:
        raise document.error(f"hardware.gpus must be at least 1, not {gpus}", ("hardware", "gpus"))
    capability = row.capability if row and wanted != "auto" else here.get("compute_capability")
    known = {"compute_capability": capability} if capability else {}
    memory_gib = round(memory_bytes / 2**30, 1)
    return {"platform": "cuda", "gpus": gpus, "gpu_name": name, "gpu_memory_gib": memory_gib, **known}


def _rows(file: HardwareFile, document: Document, base: Path) -> Rows:
    from tuner.search.hardware import written

    if not file.table:
        return ()
    if not (path := base / Path(file.table).expanduser()).is_file():
        raise document.error(f"no such hardware table: {file.table}", ("hardware", "table"), _ROWS)
    return written(path)


def _hardware(facts: Mapping[str, Any], own: Rows) -> HardwareSpec:
    memory = int(facts.get("gpu_memory_gib", facts.get("memory_gib", 0)) * 2**30)
    return HardwareSpec(str(facts["gpu_name"]), int(facts["gpus"]), memory, tuple(own))


def _part(
    key: str, said: str | dict[str, Any], document: Document, base: Path
) -> tuple[dict[str, Any], Document, tuple[str, ...]]:
    """The search space or the objective, which a study holds or names; the document that it stands in, and where."""
    if isinstance(said, dict):
        return said, document, (key,)
    found = read(shipped.find(f"{key}s", said, base, document.where((key,))), key.replace("_", " "))
    return {"name": said, **found.data}, found, ()


def _space_name(file: StudyFile, facts: Mapping[str, Any]) -> str | dict[str, Any]:
    if file.search_space:
        return file.search_space
    flags = "sglang" if file.engine.kind == "sglang" else "vllm"
    if flags == "vllm" and facts.get("platform") == "cpu":
        return "vllm-cpu/quick"
    return f"{flags}/multi-gpu" if facts.get("fewest_gpus", 1) > 1 else f"{flags}/quick"


def _space(file: StudyFile, document: Document, base: Path, facts: Mapping[str, Any]) -> SearchSpace:
    data, source, prefix = _part("search_space", _space_name(file, facts), document, base)
    return build(data, source, prefix, facts, file.parameters, document)


def _with_args(space: SearchSpace, engine: EngineSpec, file: StudyFile, document: Document) -> SearchSpace:
    """The space with the study's own flags and environment on every server, and with what they mean to this engine."""
    for flag in (name for name, value in engine.args.items() if value is False):
        document.refuse(f"--{flag}: {NO_SWITCH}", ("engine", "args", flag), off(flag, engine.kind))
    given = {name: None if value is True else value for name, value in engine.args.items() if value is not False}
    for flag, value in given.items():
        if fact := named(value):
            if fact not in space.facts:
                fix = suggest(fact, space.facts)
                raise document.error(f"--{flag}: no such fact: {fact}", ("engine", "args", flag), fix)
            given[flag] = space.facts[fact]
    for parameter in space.parameters:
        tuned = {flag for emission in parameter.emissions for flag in emission.flags}
        for flag in sorted((tuned | heads(tuned)) & set(given)):
            other = f"pin it with parameters: {{{parameter.name}: {given[flag]}}}"
            if flag not in tuned:
                other = f"give the parts that are fixed one by one: {flag}.NAME: VALUE"
            wrong = document.error(
                f"--{flag} is fixed in engine.args and tuned as {parameter.name}",
                ("engine", "args", flag),
                f"remove it there, or {other}",
            )
            if "." not in flag or not document.begun:
                raise wrong
    _check_both(given, space, "args", document)
    _check_both(engine.env, space, "env", document)
    space = replace(space, fixed={**given, **space.fixed}, env={**engine.env, **space.env})
    return space if as_before(document) else _meant(space, engine.kind, file.hardware)


def _least(space: SearchSpace, model: str) -> int:
    """How many GPUs every server takes, whatever is tuned."""
    tuned = {flag for p in space.parameters for emission in p.emissions for flag in emission.flags}
    fixed = {flag: value for flag, value in space.fixed.items() if flag not in tuned}
    fixed |= dict.fromkeys({SHARED} & tuned)
    return replace(space, parameters=(), fixed=fixed).config({}, model).gpus


def _meant(space: SearchSpace, kind: str, hardware: HardwareFile) -> SearchSpace:
    """The space with what its fixed flags mean to this kind of engine: which are parts of JSON, which count GPUs."""
    parts = heads(space.fixed)
    reads = kind in ("vllm", "emulator")
    if not reads:  # elsewhere a dot may be a part of a flag's name
        parts &= set(space.fixed)
    sized = space.sized if reads or kind in ("sglang", *USERS) else ()
    if kind in USERS:
        sized = tuple(flag for flag in sized if flag.endswith("-parallel-size"))
    gpus = space.gpus
    counted = gpus > 1 or any(p.counts_gpus for p in space.parameters)
    if kind == "attach" and not counted and hardware.gpus != "auto" and space.facts.get("platform") != "cpu":
        gpus = hardware.gpus  # nothing else can use them
    return replace(space, gpus=gpus, joined=space.joined | parts, reads=reads, sized=sized)


def _check_both(given: Mapping[str, Any], space: SearchSpace, part: str, document: Document) -> None:
    """Refuses what the study gives every server, and its search space (or a pinned parameter) gives them otherwise."""
    theirs = space.env if part == "env" else space.fixed
    for name, value in given.items():
        same = {name, f"no-{name}", name.removeprefix("no-"), name.partition(".")[0]}
        for other in [flag for flag in theirs if flag in same or flag.partition(".")[0] == name]:
            said = space.facts.get(named(theirs[other]), theirs[other])
            if other != name or str(said) != str(value):
                mine, its = (text if v is None else f"{text} {v}" for text, v in ((name, value), (other, said)))
                document.refuse(
                    f"engine.{part} says {mine}, the search space or a pinned parameter says {its}",
                    ("engine", part, name),
                    "keep one of the two",
                )


def _objective(
    file: StudyFile,
    document: Document,
    base: Path,
    hardware: HardwareSpec,
    frozen: Mapping[str, Any],
    gpus: set[str],
) -> Objective:
    data, source, prefix = _part("objective", file.objective, document, base)
    spec = validate(ObjectiveFile, source, data, prefix)
    slos = [_slo(k, v, source, (*prefix, "slo", k)) for k, v in spec.slo.items() if k not in file.slo]
    slos += [_slo(k, v, document, ("slo", k)) for k, v in file.slo.items()]
    if file.engine.kind not in ("function", "own") and not any(x.latency for x in slos):
        document.refuse(
            "no SLO is on a latency: a server whose queue grows for ever would hold every load",
            ("slo",) if "slo" in document.data else ("objective",),
            "Add one, a loose one where nobody waits: slo: {e2e_p99: 5min}",
        )
    try:
        slo.check_metric(spec.latency)
        if spec.latency == "error_rate":
            raise ValueError("the latency axis is a latency, not error_rate")
    except ValueError as error:
        raise source.error(str(error), (*prefix, "latency")) from None
    if wrong := slo.slip(slo.Slo(spec.latency, math.inf), ""):
        source.refuse(wrong, (*prefix, "latency"))
    said = file.price_usd_per_gpu_hour
    prices = said if isinstance(said, dict) else {}
    price = None if isinstance(said, dict) else said
    price = spec.price_usd_per_gpu_hour if price is None else price
    assumed = price is None
    price = price or frozen.get("price_usd_per_gpu_hour", price)
    if prices:
        from tuner.search import hardware as table

        rows, device_of = table.table(hardware.rows), partial(table.device_of, own=hardware.rows)
        for name in prices:  # a cluster may have others
            if not table.lookup(name, rows) and name not in (hardware.name, *gpus) and _executor(file).kind == "local":
                fix = suggest(name, [*rows, hardware.name])
                document.refuse(f"a price of an unknown GPU {name!r}", ("price_usd_per_gpu_hour", name), fix)
        if pair := twice(prices, device_of):
            at = ("price_usd_per_gpu_hour", pair[1])
            document.refuse(f"{pair[1]}: {device_of(pair[1])} has a price already", at, "keep one of them")
        prices = {device_of(name): usd for name, usd in prices.items()}
        assumed = assumed and hardware.name not in prices
        price = prices.get(hardware.name, price)
    if price is None:
        from tuner.search import hardware as table

        row = table.cpu() if hardware.gpus == 0 else table.lookup(hardware.name, table.table(hardware.rows))
        price = row.price_usd_per_hour if row else 1.0
    if not all(0 < usd < math.inf for usd in (price, *prices.values())):
        where, place = (source, prefix) if said is None else (document, ())
        where.refuse("the price per GPU-hour must be above zero", (*place, "price_usd_per_gpu_hour"))
    floor = QualityFloor(**spec.quality.model_dump())
    for name, most in (("kl_max", math.inf), ("top1_min", 1.0), ("greedy_min", 1.0)):
        value = getattr(floor, name)
        if value is not None and not (0 <= value <= most and value < math.inf):
            kind = "a share from 0 to 1" if most == 1 else "nats per token, 0 or more"
            source.refuse(f"quality.{name} is {kind}, not {value:g}", (*prefix, "quality", name))
    return Objective(spec.name, spec.latency, tuple(slos), float(price), floor, prices, assumed)


def _slo(metric: str, limit: Any, document: Document, at: tuple[str, ...]) -> slo.Slo:
    try:
        found = slo.Slo(slo.check_metric(metric), slo.parse_limit(metric, limit))
    except ValueError as error:
        raise document.error(str(error), at) from None
    if wrong := slo.slip(found, limit):
        document.refuse(wrong, at)
    return found


def differences(before: Study, now: Study) -> list[str]:
    """Which parts of a study changed in a way that makes its measurements incomparable. Held-out windows are the
    caller's to judge: before anything was measured on them, there may be more or fewer. Another host's cores and memory
    count where the space's parameters depend on them; a fact that ``before`` did not know as yet counts as little."""
    parts = ("model", "engine", "space", "objective", "trace", "load", "hardware")
    if now.load.auto and "ladder" in before.frozen["frozen"]:
        now = replace(now, load=replace(now.load, ladder=before.load.ladder, auto=False))
    now = replace(now, trace=replace(now.trace, heldout_windows=before.trace.heldout_windows))
    known = before.space.facts
    host = {fact: known[fact] for fact in ("cpu_cores", "memory_gib") if fact in known}
    facts = {name: fact for name, fact in {**now.space.facts, **host}.items() if name in known}
    now = replace(now, space=replace(now.space, facts=facts))
    return [part for part in parts if getattr(before, part) != getattr(now, part)]
