"""A Ray cluster as the tuner sees it: nodes, their GPUs, what type those are and what they cost."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.errors import EnvironmentFault
from tuner.executor.protocol import Place
from tuner.search import hardware
from tuner.space.config import ServingConfig
from tuner.spec.study import Rows, Study

TYPE = "accelerator_type:"  # Ray's own resource for the type of a node's accelerator
_INSTALL = 'pip install -e ".[ray]" in tuner\'s checkout'
_CONNECT_S = 5.0
_LOST_S = 10.0  # without a word of Ray's head; Ray ends the whole process after 60
_LOOK_S = 1.0  # how old what is known of the nodes may be


@dataclass(frozen=True, slots=True)
class Node:
    """One node. ``name`` is short and unique; ``type`` is Ray's word for its accelerator (``H100``), empty where it
    has none or Ray does not know; ``device`` the row of the hardware table that it means (or the word itself)."""

    id: str
    name: str
    alive: bool
    gpus: int
    cpus: int
    type: str = ""
    device: str = ""
    why_gone: str = ""


class Watch:
    """The connected cluster's nodes, at most a second old. ``avoid``: the ids of those that get no more trials."""

    def __init__(self, own: Rows = ()) -> None:
        self.avoid: set[str] = set()
        self._own = own  # the study's rows of the hardware table
        self.lost = False  # the head is gone: whatever is asked of Ray would wait for it
        self._nodes: list[Node] = []
        self._looked_s = -_LOOK_S
        self._silent_s = math.inf  # since when the head does not answer

    def nodes(self, fresh: bool = False) -> list[Node]:
        """Every node that the cluster has or had. Raises ``EnvironmentFault`` where its head is gone."""
        if (fresh or time.monotonic() - self._looked_s >= _LOOK_S) and self._head_answers():
            self._looked_s, self._nodes = time.monotonic(), nodes(self._own)
        return self._nodes

    def _head_answers(self) -> bool:
        import ray

        head, now_s = ray.get_runtime_context().gcs_address, time.monotonic()
        try:
            _reach(head)
        except OSError as error:
            self._silent_s = min(self._silent_s, now_s)
            if now_s - self._silent_s < _LOST_S:
                return False
            self.lost = True
            fix = "Start a cluster and run the same command again: everything measured is kept"
            raise EnvironmentFault(f"Ray's head at {head} is gone: {error}", fix=fix) from None
        self._silent_s = math.inf
        return True

    def usable(self) -> list[Node]:
        return [node for node in self.nodes() if node.alive and node.id not in self.avoid]


def connect(address: str) -> Any:
    """Ray, connected to the cluster at ``address`` (``auto``: the one that this machine belongs to).

    Raises ``EnvironmentFault`` where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise EnvironmentFault("executor ray: Ray is not installed here", fix=_INSTALL) from None
    if ray.is_initialized():
        return ray
    try:
        if ":" in address:
            _reach(address.rpartition("/")[2])  # Ray itself tries for minutes
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "start one with `ray start --head`, join it with `ray start --address=HOST:6379`, or give --address"
        raise EnvironmentFault(f"no Ray cluster at {address or 'auto'}: {said}", fix=fix) from None
    return ray


def _reach(address: str) -> None:
    """Raises OSError where nothing listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def nodes(own: Rows = ()) -> list[Node]:
    """Every node that the connected cluster has or had, by the names of the hardware table with a study's ``own``."""
    import ray

    return named(sorted(ray.nodes(), key=lambda entry: entry["NodeID"]), own)


def survey(address: str, wanted: str = "", own: Rows = ()) -> Node:
    """The node with the most GPUs (of the type ``wanted``): what a study on this cluster may use per launch.

    Raises ``EnvironmentFault`` where the cluster has several types and none is named.
    """
    connect(address)
    alive = [node for node in nodes(own) if node.alive]
    same = [node for node in alive if not wanted or node.device == hardware.device_of(wanted, own)] or alive
    types = sorted({node.device for node in same if node.gpus and node.device})
    if len(types) > 1:
        fix = f"name one: hardware: {{gpu: {types[0]}}}; a parameter of the search space may compare them"
        raise EnvironmentFault(f"the cluster has several types of GPU: {', '.join(types)}", fix=fix)
    if not same:
        raise EnvironmentFault("the cluster has no node", fix="ray status")
    return max(same, key=lambda node: node.gpus)


def price(study: Study, device: str) -> float:
    """USD per GPU-hour on ``device``: the study's mapping, else its price for its own hardware, else the table's."""
    objective, own = study.objective, study.hardware.rows
    given = {hardware.device_of(name, own): usd for name, usd in objective.prices.items()}
    if device in given:
        return given[device]
    if not device or device == study.hardware.name:
        return objective.price_usd_per_gpu_hour
    row = hardware.lookup(device, hardware.table(own))
    return row.price_usd_per_hour if row and row.kind == "gpu" else objective.price_usd_per_gpu_hour


def device(study: Study, wanted: str) -> str:
    """The hardware table's name for the type of GPU that is ``wanted`` (empty: the study's own)."""
    return hardware.device_of(wanted, study.hardware.rows) or study.hardware.name


def price_of(study: Study, config: ServingConfig) -> float:
    """USD per GPU-hour on the type of GPU that ``config`` names, else on the study's own."""
    return price(study, device(study, config.gpu))


def place_of(study: Study, config: ServingConfig) -> Place:
    """Where ``config`` runs as far as the study says: its type of GPU and what that costs."""
    return Place("", device(study, config.gpu), price_of(study, config))


def named(entries: Iterable[Mapping[str, Any]], own: Rows = ()) -> list[Node]:
    """Ray's node entries as nodes; ``own`` as for :func:`nodes`."""
    found, seen = [], set[str]()
    for entry in entries:
        resources, labels = entry.get("Resources") or {}, entry.get("Labels") or {}
        word = labels.get("ray.io/accelerator-type") or next(
            (name.removeprefix(TYPE) for name in resources if name.startswith(TYPE)), ""
        )
        name = str(entry.get("NodeManagerHostname") or entry.get("NodeName") or entry.get("NodeManagerAddress"))
        if name in seen:  # several nodes on one machine
            name = f"{name}/{entry['NodeID'][:6]}"
        seen.add(name)
        found.append(
            Node(
                id=entry["NodeID"],
                name=name,
                alive=bool(entry["Alive"]),
                gpus=int(resources.get("GPU", 0)),
                cpus=int(resources.get("CPU", 0)),
                type=word,
                device=hardware.device_of(word, own),
                why_gone=str(entry.get("DeathReasonMessage") or ""),
            )
        )
    return found
