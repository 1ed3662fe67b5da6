"""The command engine fills the places of a template; no shell is involved."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.engines.conftest import plan
from tuner.engines import build
from tuner.engines.command import CommandEngine
from tuner.engines.protocol import LaunchFailed, Site
from tuner.errors import UsageError
from tuner.server.start import Binding
from tuner.space.config import ServingConfig
from tuner.spec import studyfile
from tuner.study import session

ROOT = Path(__file__).parents[2]
BINDING = Binding(8123, "secret", "tuner-abc", Path("/t"), (2, 3))
CONFIG = ServingConfig("org/model", {}, {"ctx-size": 2048, "flash-attn": None}, gpus=2)
EMULATOR = [
    sys.executable,
    "-m",
    "tuner.engines.emulator",
    "--model",
    "{model}",
    "--port",
    "{port}",
    "--host",
    "{host}",
]
EMULATOR += ["--served-model-name", "{served}", "--api-key", "{api_key}", "--emulator", '{"boot_scale": 0}']


def words(command: list[str], config: ServingConfig, site: Site) -> list[str]:
    return CommandEngine(command=command).words(command, config, site, BINDING, flags=True)


def test_flags_are_appended_and_places_filled(site: Site) -> None:
    command = ["llama-server", "-m", "{model}", "--port", "{port}", "--api-key", "{api_key}"]

    assert words(command, CONFIG, site) == [
        *("llama-server", "-m", "org/model", "--port", "8123", "--api-key", "secret"),
        *("--ctx-size", "2048", "--flash-attn"),
    ]


def test_the_host_is_this_machine_alone(site: Site) -> None:
    """A server under test, and the random key of it, are nobody else's."""
    assert words(["server", "--host={host}", "{port}"], CONFIG, site)[1] == "--host=127.0.0.1"


def test_a_flag_with_a_place_goes_there_and_nowhere_else(site: Site) -> None:
    command = ["server", "--port={port}", "-c", "{ctx-size=4096}", "{flags}", "--gpus", "device={gpus}"]

    assert words(command, CONFIG, site) == [
        *("server", "--port=8123", "-c", "2048", "--flash-attn", "--gpus", "device=2,3"),
    ]


def test_a_place_without_its_flag_takes_the_default_that_stands_there(site: Site) -> None:
    assert words(["s", "{port}", "{ctx-size=4096}"], ServingConfig("m", {}, {}), site) == ["s", "8123", "4096"]


def test_a_place_that_is_nothing_is_refused(site: Site) -> None:
    with pytest.raises(UsageError, match=r"\{ctx-size\} is neither"):
        words(["s", "{port}", "{ctx-size}"], ServingConfig("m", {}, {}), site)


def test_a_command_that_cannot_be_told_its_port_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no \{port\}"):
        CommandEngine(command=["server", "--port", "8000"])


def test_json_in_a_word_is_left_alone(site: Site) -> None:
    command = ["s", "{port}", '{"boot_scale": 0}']

    assert words(command, ServingConfig("m", {}, {}), site)[-1] == '{"boot_scale": 0}'


def test_the_stop_command_runs_once_and_after_the_server_is_gone(config: ServingConfig, site: Site) -> None:
    mark = site.folder / "stopped"
    code = (
        "import socket,sys; s=socket.socket(); gone=s.connect_ex(('127.0.0.1', int(sys.argv[2])))!=0;"
        "open(sys.argv[1],'a').write(sys.argv[3] + ' ' + str(gone) + '\\n')"
    )
    stop = [sys.executable, "-c", code, str(mark), "{port}", "{served}"]
    env = {"PYTHONPATH": str(ROOT)}
    server = CommandEngine(command=EMULATOR, env=env, stop_command=stop, host_alone=False).launch(config, site)
    assert server.measure(plan(site)).ok
    server.stop()
    server.stop()

    assert server.endpoint is not None
    assert mark.read_text() == f"{server.endpoint.model} True\n"


def test_the_stop_command_runs_after_a_launch_that_failed(config: ServingConfig, site: Site) -> None:
    mark = site.folder / "stopped"
    stop = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(mark)]
    command = [sys.executable, "-c", "raise SystemExit(3)", "{port}"]

    with pytest.raises(LaunchFailed):
        CommandEngine(command=command, stop_command=stop, host_alone=False).launch(config, site)

    assert mark.exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/no/such/program", "directory: /no/such/program"),
        ("no-such-program", "directory: no-such-program (on the PATH)"),
    ],
)
def test_a_program_that_does_not_exist_is_an_outcome(
    config: ServingConfig, site: Site, program: str, says: str
) -> None:
    with pytest.raises(LaunchFailed) as failure:
        CommandEngine(command=[program, "{port}"], host_alone=False).launch(config, site)

    assert failure.value.outcome.cause == "missing-dependency"
    assert failure.value.outcome.message.endswith(says)


@pytest.mark.parametrize(
    ("words", "flags", "own"),
    [
        (["--ctx-sise", "4"], {}, True),
        (["--ctx-sise=4"], {"parallel": 2}, True),
        (["--parallel", "4"], {"no-such-flag": 2}, False),
        (["--parallel", "4"], {"parallel": 2, "no-such-flag": 2}, False),
    ],
)
def test_an_unknown_flag_of_the_commands_own_words_ends_the_study_and_one_of_the_space_is_an_outcome(
    model: str, site: Site, words: list[str], flags: dict[str, int], own: bool
) -> None:
    parse = "import argparse; p = argparse.ArgumentParser(); p.add_argument('port'); p.add_argument('--parallel')"
    command = [sys.executable, "-c", f"{parse}; p.parse_args()", "{port}", *words]
    config = ServingConfig(model, {}, flags)

    with pytest.raises(UsageError if own else LaunchFailed) as failure:
        CommandEngine(command=command, host_alone=False).launch(config, site)

    if isinstance(failure.value, LaunchFailed):
        assert failure.value.outcome.cause == "unknown-flag"
    else:
        assert "does not know --ctx-sise, which stands in engine.command" in str(failure.value)


class Daemon:
    """Serves outside of the launched tree, as a container's daemon does: on the port that the command wrote into
    ``asked``, until somebody gets ``/stop``."""

    def __init__(self, asked: Path) -> None:
        self.up = asked.with_suffix(".up")
        self._asked, self._end = asked, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def __enter__(self) -> Daemon:
        return self

    def _run(self) -> None:
        while not self._asked.exists():
            if self._end.wait(0.05):
                return
        port, name = self._asked.read_text().split()
        with ThreadingHTTPServer(("127.0.0.1", int(port)), self._answers(name)) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()
            self.up.touch()
            self._end.wait()
            server.shutdown()

    def _answers(self, name: str) -> type[BaseHTTPRequestHandler]:
        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/stop":
                    self.server.shutdown()  # else its last look at the socket keeps the port for a moment
                    self.server.server_close()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"data": [{"id": name}]}).encode())

            def log_message(self, *_: object) -> None:
                pass

        return Answers


_ASK = "import os,sys,time; open('asked.part','w').write(' '.join(sys.argv[1:3])); os.rename('asked.part','asked')"
_WAIT = "; [time.sleep(0.05) for _ in iter(lambda: os.path.exists('asked.up'), True)]"
_STOP = "import sys,urllib.request; urllib.request.urlopen('http://127.0.0.1:' + sys.argv[1] + '/stop').read()"


@pytest.mark.parametrize("then", ["; time.sleep(1000)", _WAIT + "; sys.exit(3)"], ids=["serves", "fails"])
@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "not stopped"])
def test_what_the_stop_command_ended_is_not_left_over(site: Site, then: str, stops: bool) -> None:
    stop = [sys.executable, "-c", _STOP, "{port}"] if stops else []
    command = [sys.executable, "-c", _ASK + then, "{port}", "{served}"]
    engine = CommandEngine(command=command, stop_command=stop, host_alone=False, stop_wait_s=1)
    with Daemon(site.folder / "asked"):
        try:
            teardown = engine.launch(ServingConfig("m", {}, {}), site).stop()
        except LaunchFailed as failure:
            teardown = failure.teardown
    assert bool(teardown.left_over) != stops


_SERVE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
asked = []
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health":
            asked.append(1)
            open("asked", "w").write(str(len(asked)))
        self.send_response(503 if self.path == "/health" and len(asked) < 3 else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": name} for name in sys.argv[2:]]}).encode())
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


@pytest.mark.parametrize(("names", "asked_for"), [(["theirs"], "theirs"), (["theirs", "m:latest"], "m"), ([], "m")])
def test_without_a_name_in_the_command_the_only_one_is_taken_once_the_server_is_well(
    site: Site, names: list[str], asked_for: str
) -> None:
    engine = CommandEngine(command=[sys.executable, "-c", _SERVE, "{port}", *names], host_alone=False, stop_wait_s=1)
    server = engine.launch(ServingConfig("m", {}, {}), site)
    try:
        assert server.endpoint is not None and server.endpoint.model == asked_for
        assert int((site.folder / "asked").read_text()) >= 3  # refused twice
    finally:
        server.stop()


_STUDY = """\
name: s
model: {model}
engine:
  kind: command
  command: [server, "{{port}}"]
  options:
    version: "1"
    {option}
hardware: {{gpu: L4, gpus: 1}}
search_space: {{name: c, engine: any, parameters: {{a: {{flag: a, values: [1, 2], default: 1, trades: x}}}}}}
objective: {{name: o, latency: tpot_p99, slo: {{tpot_p99: 5s}}}}
price_usd_per_gpu_hour: 1
trace: {{file: TRACE, window: 20s}}
""".replace("TRACE", str(ROOT / "examples/traces/conversation-small.jsonl"))


@pytest.mark.parametrize(
    "wrong",
    [
        "start_limit_s: 1h",
        "start_limit_s: .nan",
        "stop_wait_s: .inf",
        f"start_limit_s: -1{'0' * 400}",
        "stop_wait_s: -1",
        "stop_wait_s: true",
        "phase_limit_s: soon",
        "phase_limit_s: {start: -1}",
        "phase_limit_s: {start: fast}",
        "health: 5",
        "stop_command: docker rm -f x",
        "stop_command: [1]",
        "shares_port: maybe",
    ],
)
def test_an_option_that_cannot_have_its_value_is_named_with_its_line(tmp_path: Path, model: str, wrong: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(_STUDY.format(model=model, option=wrong))
    with pytest.raises(UsageError, match=rf"s\.yaml:8: engine\.options\.{wrong.partition(':')[0]}: .*, not "):
        build.engine(studyfile.load(file))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("start_limit: 5", "8: command has no engine.options.start_limit. Did you mean 'start_limit_s'?"),
        ("command: [x]", "8: engine.options.command is said elsewhere. take it out of engine.options"),
    ],
)
def test_an_option_that_there_is_none_of_is_named_with_its_line(
    tmp_path: Path, model: str, option: str, says: str
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(_STUDY.format(model=model, option=option))
    with pytest.raises(UsageError) as error:
        build.engine(studyfile.load(file))
    assert str(error.value).startswith(f"{file}:{says}")


def test_the_options_that_are_named_instead_are_those_that_a_study_may_say(tmp_path: Path, model: str) -> None:
    text = _STUDY.format(model=model, option="nonsense: 1").replace('version: "1"', "target: f.py:g")
    (file := tmp_path / "s.yaml").write_text(text.replace("kind: command", "kind: function"))
    with pytest.raises(UsageError, match=r"function has no engine\.options\.nonsense") as error:
        build.engine(studyfile.load(file))
    assert error.value.fix == "Known: emulated"
    file.write_text(file.read_text().replace("nonsense: 1", "folder: x"))
    with pytest.raises(UsageError, match=r"engine\.options\.folder is said elsewhere") as error:
        build.engine(studyfile.load(file))
    assert "target" not in error.value.fix


def test_a_command_as_its_refusal_says_it_is_taken() -> None:
    with pytest.raises(UsageError, match=r"no \{port\}") as error:
        CommandEngine(command=["my-server"])
    assert '--port {port} (in a list two words, "{port}" in quotes)' in error.value.fix


def test_what_was_written_beside_the_options_is_named_as_it_was_written(tmp_path: Path, model: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(_STUDY.format(model=model, option="stop_wait_s: 5").replace("  options:", "  gpu: L4\n  options:"))
    with pytest.raises(UsageError, match=r"command has no engine\.gpu") as error:
        build.engine(studyfile.load(file))
    assert error.value.where == f"{file}:6" and "command" not in error.value.fix.replace(",", " ").split()


def test_what_an_engine_refuses_of_its_options_has_their_line(tmp_path: Path, model: str) -> None:
    text = _STUDY.format(model=model, option="time_scale: 0.0").replace('version: "1"', "clock: wall")
    (file := tmp_path / "s.yaml").write_text(text.replace("kind: command", "kind: emulator"))
    with pytest.raises(UsageError, match=r"s\.yaml:8: engine\.options\.time_scale must be above zero"):
        build.engine(studyfile.load(file))


def test_options_with_values_that_they_may_have_are_taken(tmp_path: Path, model: str) -> None:
    engine = CommandEngine(command=["s", "{port}"], phase_limit_s={"start": 5}, start_limit_s=60)
    assert (engine.start_limit_s, engine.phase_limit_s) == (60, {"start": 5})
    file = tmp_path / "s.yaml"
    file.write_text(_STUDY.format(model=model, option="start_limit_s: .inf").replace('version: "1"', "version: 1.0"))
    build.engine(studyfile.load(file))


@pytest.mark.parametrize("option", ["stop_command: [kill, '{ctx-size}']", "env: {CTX: '{ctx-size}'}"])
def test_a_place_that_is_nothing_is_refused_with_its_line_before_a_launch(
    tmp_path: Path, model: str, option: str
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(_STUDY.format(model=model, option=option.replace("ctx-size", "ctx-size=1")))
    assert session.prepare(studyfile.load(file))
    file.write_text(_STUDY.format(model=model, option=option))
    with pytest.raises(UsageError, match=r"s\.yaml:5: engine\.command: \{ctx-size\} is neither"):
        session.prepare(studyfile.load(file))
