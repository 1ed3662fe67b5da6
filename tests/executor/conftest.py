import pytest


@pytest.fixture(scope="session")
def cluster():
    """Three nodes of this machine, each with two GPUs that are only declared."""
    ray = pytest.importorskip("ray", reason='no Ray here: pip install "tuner[ray]"')
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    for _ in range(2):
        made.add_node(wait=False, num_cpus=2, num_gpus=2)
    made.wait_for_nodes(timeout=300)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
