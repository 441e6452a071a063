"""A search on a Ray cluster of two nodes, one of which goes away."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasbench.config import load_config
from nasbench.evaluators.base import Evaluation, Proposals, Status
from nasbench.execution.base import Spread
from nasbench.execution.choice import executed
from nasbench.plan import make_plan
from search_spaces import UserError

PARTS = """
import os, pathlib, time

def logged(choices):
    time.sleep(0.3)
    with (pathlib.Path(__file__).parent / "log.txt").open("a") as log:
        log.write(f"{os.getppid()}\\n")
    return score(choices)
"""

KEYS = """
[strategy]
name = "random"
[execution]
backend = "ray"
workers = 2
"""

pytestmark = pytest.mark.extra("ray")


@pytest.fixture
def experiment(scored: Any, tmp_path: Path) -> Path:
    return scored.lay_out(tmp_path, KEYS, PARTS)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one processor each, on this machine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    cluster.other = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_goes_away_in_mid_search_costs_no_evaluation(scored: Any, cluster: Any, experiment: Path) -> None:
    changes = [f"execution.address={cluster.address}", "evaluator.name=parts:logged"]
    plan = make_plan(load_config(experiment, changes), experiment.parent)
    archs = np.unique(plan.space.sample(600, np.random.default_rng(0)), axis=0)[:24]
    with closing(executed(plan, plan.make_evaluator(None, None), experiment.parent, experiment.parent)) as spread:
        assert isinstance(spread, Spread)
        seen: dict[int, Evaluation] = {}
        for asked, result in spread.stream([Proposals(np.arange(24), archs)]):
            seen[int(asked.ids[0])] = result
            nodes = set((experiment.parent / "log.txt").read_text().split())
            if cluster.other is not None and len(nodes) == 2 and len(seen) >= 4:
                cluster.remove_node(cluster.other, allow_graceful=False)
                cluster.other = None
    assert cluster.other is None, "it ended before the node was killed"
    assert sorted(seen) == list(range(24))
    assert all(result.status[0] == Status.OK for result in seen.values())
    assert [float(seen[row].values[0, 0]) for row in range(24)] == scored.scores(plan.space, archs).tolist()


def test_a_cluster_that_is_not_there_is_tried_again_and_then_named(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def init(address: str, **_: object) -> None:
        tried.append(address)
        raise ConnectionError(f"ray client connection to {address} timed out\nwith a second line")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("nasbench.execution.ray_cluster._WAITS_S", (0.01, 0.01))
    plan = make_plan(load_config(experiment, ["execution.address=10.0.0.1:6379"]), experiment.parent)
    with pytest.raises(UserError, match=r"cannot reach the cluster at execution.address = '10.0.0.1:6379'.*--resume"):
        executed(plan, plan.make_evaluator(None, None), experiment.parent, experiment.parent)
    assert tried == ["10.0.0.1:6379"] * 3
