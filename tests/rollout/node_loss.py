"""A cluster of two nodes, one of which is killed while it plays; `outcome.json` records the episodes' outcomes.

python -m tests.rollout.node_loss DIRECTORY
"""

import json
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ipvla.rollout.endpoint import Serving
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.types import EpisodeSpec
from tests.rollout.point import Points, load_point

SPECS = [EpisodeSpec("point", task, seed, trial=seed) for task in ("ground_go", "recall_go") for seed in range(20)]


def main(directory: Path) -> None:
    # A dead node is noticed after 2 s instead of half a minute; a slow one has its ten seconds to answer.
    health = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    doomed = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    # One of two simulators is on the node that dies, as there is a CPU on each, and so is the policy.
    there = NodeAffinitySchedulingStrategy(doomed.node_id, soft=True)
    policy = PolicyService(PolicySource(load_point, directory), Serving(resources={"scheduling_strategy": there}))
    yielded = []

    def on_result(result):
        yielded.append(result)
        if len(yielded) == 5:
            cluster.remove_node(doomed, allow_graceful=False)
            while alive_nodes() > 1:  # or the rest would be played before the death is noticed
                time.sleep(0.2)

    with SimPool(Points(), 2, cpus_per_simulator=1) as pool, Journal(directory / "journal.sqlite", {}) as journal:
        results = evaluate_episodes(SPECS, pool, policy, journal, on_result=on_result)
    outcome = {
        "outcomes": {r.spec.key: r.outcome for r in results},
        "attempts": sum(r.spec.attempt for r in results),
        "yielded": len(yielded),
        "nodes": alive_nodes(),
    }
    (directory / "outcome.json").write_text(json.dumps(outcome))  # Ray too may print to stdout
    ray.shutdown()
    cluster.shutdown()


def alive_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
