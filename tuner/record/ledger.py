"""What of a study has reached MLflow. The study folder is the spool; this small file says what is left to send."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tuner.spec.storage import masked
from tuner.study.store import AsWritten, read_json, write_json


@dataclass(slots=True)
class Sent:
    """To one MLflow store: the parent run, the child run of every trial that was logged whole, and the digest of the
    end that the parent was closed with (empty: it is running)."""

    experiment: str = ""
    parent: str = ""
    trials: dict[str, str] = field(default_factory=dict)
    end: str = ""


@dataclass(slots=True)
class Ledger:
    """``mlflow.json`` in the study folder; ``uid`` finds the parent run again, ``stores`` are by their URI without its
    password. Only the writer writes it."""

    path: Path
    uid: str = ""
    stores: dict[str, Sent] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """Raises EnvironmentFault where the file is damaged."""
        path = folder / "mlflow.json"
        if not path.exists():
            return cls(path, uid=uuid.uuid4().hex)
        data = read_json(path)
        with AsWritten(path):
            return cls(path, data["uid"], {masked(uri): Sent(**sent) for uri, sent in data["stores"].items()})

    def save(self) -> None:
        write_json(self.path, {"uid": self.uid, "stores": {uri: asdict(sent) for uri, sent in self.stores.items()}})

    def anew(self) -> None:
        """A study of its own, of which nothing was sent."""
        self.uid, self.stores = uuid.uuid4().hex, {}

    def sent(self, uri: str) -> Sent:
        return self.stores.setdefault(masked(uri), Sent())


def note_file(folder: Path) -> Path:
    """The parent run's page, in the study folder. It exists while the study is finished: a file of its own, so that a
    study that ended while the server was away still ends in MLflow."""
    return folder / "mlflow-note.md"
