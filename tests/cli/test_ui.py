"""`tuner ui`: MLflow's server, its port and its end."""

import socket
import subprocess
import sys
import time

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
