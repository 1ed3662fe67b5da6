import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import studies
from tuner.errors import EnvironmentFault
from tuner.executor import cluster
from tuner.search.hardware import device_of


def entry(number, alive=True, **resources):
    return {"NodeID": f"{number:06}ff", "NodeManagerHostname": "box", "Alive": alive, "Resources": resources}


def test_nodes_have_short_unique_names_and_say_what_gpu_they_have():
    one, two, three = cluster.named(
        [
            entry(1, CPU=8.0, GPU=4.0, **{"accelerator_type:H100": 1.0}),
            entry(2, CPU=8.0) | {"NodeManagerHostname": "other"},
            entry(3, alive=False) | {"DeathReasonMessage": "preempted", "Labels": {"ray.io/accelerator-type": "L4"}},
        ]
    )
    assert (one.name, one.gpus, one.type, one.device) == ("box", 4, "H100", device_of("H100"))
    assert (two.name, two.gpus, two.device) == ("other", 0, "")
    assert (three.name, three.alive, three.device, three.why_gone) == ("box/000003", False, "L4", "preempted")


def test_a_node_has_the_name_that_the_studys_own_table_gives_its_gpu():
    own = [dict(name="mine", match=["H100"], memory_gib=80, bandwidth=3000, tflops={"bf16": 900}, source="s")]
    (node,) = cluster.named([entry(1, GPU=4.0, **{"accelerator_type:H100": 1.0})], own)
    assert node.device == "mine"


def test_a_node_costs_what_the_study_says_of_its_type_else_what_the_table_says(tmp_path):
    study = studies.study(tmp_path)
    objective = replace(study.objective, price_usd_per_gpu_hour=1.5, prices={"H100": 2.25})
    study = replace(study, objective=objective, hardware=replace(study.hardware, name="A100-SXM-80GB"))
    assert cluster.price(study, device_of("H100")) == 2.25
    assert cluster.price(study, "A100-SXM-80GB") == 1.5  # the study's own hardware
    assert cluster.price(study, "") == 1.5
    assert cluster.price(study, "L4") == cluster.hardware.lookup("L4").price_usd_per_hour
    assert cluster.price(study, "nobody-knows") == 1.5


@pytest.fixture
def no_head(monkeypatch):
    """Ray, with a head where nothing listens."""
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    ray = SimpleNamespace(get_runtime_context=lambda: context, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", ray)


def test_a_cluster_that_is_not_there_is_said_at_once(no_head):
    with pytest.raises(EnvironmentFault, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused"):
        cluster.connect("127.0.0.1:1")


def test_a_head_that_stays_silent_ends_the_study_before_ray_ends_the_process(no_head, monkeypatch):
    watch = cluster.Watch()
    assert watch.nodes() == [] and not watch.lost  # it may come back
    monkeypatch.setattr(cluster, "_LOST_S", 0.0)
    with pytest.raises(EnvironmentFault, match=r"Ray's head at 127\.0\.0\.1:1 is gone"):
        watch.nodes()
    assert watch.lost
