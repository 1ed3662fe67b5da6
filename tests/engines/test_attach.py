"""The attach engine measures a server that somebody else runs, and leaves it as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import plan
from tests.engines.test_emulator_process import KEY, Process
from tuner.engines.attach import AttachEngine
from tuner.engines.conformance import EngineConformance
from tuner.engines.protocol import Engine, LaunchFailed, Site
from tuner.errors import EnvironmentFault, UsageError
from tuner.space.config import ServingConfig

NOTHING = ServingConfig("m", {}, {})


@pytest.fixture
def theirs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setenv("THEIR_KEY", KEY)
    process = Process(model, tmp_path / "log")
    yield process
    process.end()


def attached(theirs: Process, **more: str) -> AttachEngine:
    return AttachEngine(**{"url": f"http://127.0.0.1:{theirs.port}", "api_key_env": "THEIR_KEY", **more})


class TestAttach(EngineConformance):
    ours = False

    @pytest.fixture(autouse=True)
    def _their_server(self, theirs: Process) -> None:
        self.theirs = theirs

    def engine(self) -> Engine:
        return attached(self.theirs)

    def config(self) -> ServingConfig:
        return NOTHING

    def bad_config(self) -> ServingConfig | None:
        return ServingConfig("m", {"max_num_seqs": 8}, {"max-num-seqs": 8})


def test_stopping_leaves_the_server_running(theirs: Process, site: Site) -> None:
    server = attached(theirs).launch(NOTHING, site)
    server.stop()

    assert theirs.get("/health")[0] == 200


def test_the_url_may_end_in_v1_and_the_version_is_asked(theirs: Process) -> None:
    assert attached(theirs, url=f"http://127.0.0.1:{theirs.port}/v1").version() == "0.32.0"


def test_a_model_that_it_does_not_serve_is_refused_with_those_it_serves(theirs: Process, site: Site) -> None:
    with pytest.raises(UsageError, match="it serves m"):
        attached(theirs, model="other").launch(NOTHING, site)


def test_a_wrong_key_is_said_to_be_one(theirs: Process, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", "wrong")

    with pytest.raises(EnvironmentFault, match=r"refuses the key .*Is the key in THEIR_KEY right\?"):
        attached(theirs).launch(NOTHING, site)
    with pytest.raises(EnvironmentFault, match=r"refuses the key .*name the environment variable .*api_key_env"):
        AttachEngine(url=f"http://127.0.0.1:{theirs.port}").launch(NOTHING, site)


def test_nobody_at_the_url_is_the_environments_fault(site: Site) -> None:
    with pytest.raises(EnvironmentFault, match="no server answers"):
        AttachEngine(url="http://127.0.0.1:9").launch(NOTHING, site)


def test_a_key_that_is_not_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)

    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set"):
        AttachEngine(url="http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize("key", ["schlüssel", "two words", "line\nbreak"])
def test_a_key_that_cannot_be_one_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("THEIR_KEY", key)

    with pytest.raises(UsageError, match="THEIR_KEY: the API key has blanks or characters"):
        AttachEngine(url="http://127.0.0.1:9", api_key_env="THEIR_KEY")


def test_a_key_from_a_file_may_end_with_its_line(theirs: Process, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", f"{KEY}\n")
    attached(theirs).launch(NOTHING, site)


def test_a_server_that_goes_away_under_load_is_an_outcome(theirs: Process, site: Site) -> None:
    server = attached(theirs).launch(NOTHING, site)
    timer = threading.Timer(0.7, theirs.process.kill)
    timer.start()

    with pytest.raises(LaunchFailed) as failure:
        server.measure(plan(site))

    timer.join()
    assert (failure.value.outcome.cause, failure.value.outcome.stage) == ("unhealthy", "under load")


def test_a_disk_that_is_full_is_no_fault_of_the_server(theirs: Process, site: Site) -> None:
    step = plan(site)
    step.records.with_name(step.records.name + ".partial").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device") as failure:
        attached(theirs).launch(NOTHING, site).measure(step)
    assert failure.value.filename == str(step.records)
