"""`tuner ui`: MLflow's server, its port and its end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest

from tuner.cli import read
from tuner.errors import EnvironmentFault


def test_the_ui_needs_a_free_port_and_leaves_no_server_behind(tmp_path, capsys, monkeypatch):
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "reports").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(EnvironmentFault, match=r"Name another one with --port"):
            read.ui(None, other.getsockname()[1])
    assert capsys.readouterr().err == ""
    with pytest.raises(EnvironmentFault, match=r"ended \(exit code 3\)"):
        read._served([sys.executable, "-c", "raise SystemExit(3)"])
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    served = f"read._served([sys.executable, '-c', {child!r}])"
    code = f"import sys; from tuner.cli import read, signals; signals.as_interrupts(); sys.exit({served})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as ui:
        pid = int(ui.stdout.readline())
        ui.terminate()
        assert ui.wait(60) == 0
    gone = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < gone
        time.sleep(0.02)


@pytest.mark.parametrize("again", [False, True])
def test_a_server_that_does_not_end_is_killed_and_a_second_interrupt_leaves_none_behind(monkeypatch, again):
    monkeypatch.setattr(read, "_STOP_S", 60.0 if again else 0.5)
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    began = []

    class Deaf(subprocess.Popen):
        def __init__(self, words, **more):
            super().__init__(words, stdout=subprocess.PIPE, **more)
            self.stdout.readline()
            began.append(self)

        def wait(self, timeout=None):
            if timeout is None and self.poll() is None and not sent:
                sent.append(threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)))
                sent[-1].start()
            if timeout and again:
                raise KeyboardInterrupt
            return super().wait(timeout)

    sent = []
    monkeypatch.setattr(read.subprocess, "Popen", Deaf)
    with pytest.raises(KeyboardInterrupt) if again else nullcontext():
        assert read._served([sys.executable, "-c", deaf]) == 0
    assert began[0].poll() == -signal.SIGKILL
