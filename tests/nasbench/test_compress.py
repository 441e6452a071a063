"""Networks of any origin through the stages: conditions, training that breaks down, kills at every stage, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nasbench.config import Config, load_config, parse_config, with_networks
from nasbench.experiment import run_experiment
from nasbench.report.stage_figures import ratios
from nasbench.run import load_run
from search_spaces import UserError

OWN = """
from torch import nn
from tests_compress_parts import Halve, Spoil, Diverge

def network():
    import torch
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def broken():
    raise RuntimeError("no such thing")

def number():
    return 3
"""

PARTS = '''
import copy
from dataclasses import replace
import torch
from nasbench.stages.base import Form, Stage
from nasbench.training.loop import BrokeDown
from search_spaces import UserError

class Halve(Stage):
    """Half of the second convolution's channels, whichever are first."""
    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT
    def run(self, candidate, context):
        network = copy.deepcopy(candidate.network)
        convolution, linear = network[3], network[7]
        convolution.out_channels = linear.in_features = convolution.out_channels // 2
        convolution.weight = torch.nn.Parameter(convolution.weight[: convolution.out_channels].detach().clone())
        convolution.bias = torch.nn.Parameter(convolution.bias[: convolution.out_channels].detach().clone())
        linear.weight = torch.nn.Parameter(linear.weight[:, : linear.in_features].detach().clone())
        return replace(candidate, network=network, notes=("halved",))

class Spoil(Stage):
    """Weights without sense."""
    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT
    def run(self, candidate, context):
        network = copy.deepcopy(candidate.network)
        with torch.no_grad():
            network[7].weight.zero_()
            network[7].bias.zero_()
        return replace(candidate, network=network)

class Diverge(Stage):
    """Training that breaks down."""
    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT
    def run(self, candidate, context):
        raise BrokeDown("training broke down at step 3 of 9: loss nan")

class Choosy(Stage):
    """Takes all networks but those called so."""
    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT
    def run(self, candidate, context):
        if candidate.name.startswith("heavy"):
            raise UserError(f"{candidate.name}: the least is 7, the budget 5")
        return candidate
'''


@pytest.fixture
def place(tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's module, and a home of its own."""
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path / "home"))
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "tests_compress_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def config(tiny_experiment: Path, stages: list[dict[str, Any]], **networks: dict[str, Any]) -> Config:
    return parse_config(
        {
            "task": {"name": "npz", "path": str(tiny_experiment.parent / "images.npz")},
            "networks": networks or {"mine": {"source": "own_networks:network"}},
            "stages": stages,
        }
    )


TRAIN = {"name": "finetune", "epochs": 2, "lr": 0.05, "distillation_weight": 0.0}
HALVE, SPOIL, DIVERGE = ({"name": f"tests_compress_parts:{n}"} for n in ("Halve", "Spoil", "Diverge"))


def results(path: Path) -> pd.DataFrame:
    """What does not depend on the clock."""
    rows = load_run(path).stages()
    return rows.drop(columns=[c for c in rows if c.startswith("latency_ms@")])


def test_a_users_network_is_changed_restored_measured_and_reported(place: Path, tiny_experiment: Path) -> None:
    view = run_experiment(config(tiny_experiment, [TRAIN, HALVE, {"name": "quantize"}]), place / "run", where=place)
    rows = view.stages()
    assert rows["stage"].tolist() == ["given", "finetune", HALVE["name"], "quantize"]
    assert rows["final"].tolist() == [False, False, False, True]
    assert rows.loc[2, "note"] == "halved"
    assert rows.loc[3, "note"] == ""
    assert rows["latency_ms@host:fp32"].notna().all()
    assert rows["accuracy"].notna().all()
    assert rows["params"].iloc[2] < rows["params"].iloc[1]
    page = (place / "run" / "report.html").read_text()
    assert "halved" in page
    assert view.plot_stages() is not None
    assert (place / "run" / "figures" / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_that_falls_too_far_sends_a_network_back_and_spares_the_others(
    place: Path, tiny_experiment: Path
) -> None:
    stages = [TRAIN, SPOIL | {"stop_if_accuracy_falls": 0.02}, {"name": "export"}]
    view = run_experiment(config(tiny_experiment, stages), place / "run", where=place)
    rows = view.stages()
    assert rows["stage"].tolist() == ["given", "finetune", SPOIL["name"]]
    assert rows["final"].tolist() == [False, True, False]
    assert "by more than stop_if_accuracy_falls = 0.02: the form of step 1 is kept" in rows.loc[2, "note"]
    again = run_experiment(view.config, place / "run", where=place, resume=True)
    pd.testing.assert_frame_equal(again.stages(), rows)


def test_training_that_breaks_down_keeps_the_last_good_state(place: Path, tiny_experiment: Path) -> None:
    view = run_experiment(config(tiny_experiment, [TRAIN, DIVERGE, {"name": "export"}]), place / "run", where=place)
    rows = view.stages()
    assert rows["stage"].tolist() == ["given", "finetune"]
    assert rows["final"].tolist() == [False, True]
    assert "Diverge failed: training broke down at step 3 of 9: loss nan" in rows.loc[1, "note"]
    real = config(tiny_experiment, [TRAIN | {"lr": 1e9}])
    rows = run_experiment(real, place / "real", where=place).stages()
    assert rows["stage"].tolist() == ["given"]
    assert "finetune failed: training broke down" in rows.loc[0, "note"]


def test_a_stage_that_cannot_take_one_network_takes_the_others(place: Path, tiny_experiment: Path) -> None:
    mine = {"source": "own_networks:network"}
    stages = [{"name": "tests_compress_parts:Choosy"}, {"name": "export"}]
    view = run_experiment(config(tiny_experiment, stages, light=mine, heavy=mine), place / "run", where=place)
    rows = view.stages().set_index("network")
    assert rows.loc["light", "stage"].tolist() == ["given", "tests_compress_parts:Choosy", "export"]
    assert rows.loc["heavy", "stage"] == "given"
    assert rows.loc["heavy", "final"]
    assert "heavy: the least is 7, the budget 5" in rows.loc["heavy", "note"]
    again = run_experiment(view.config, place / "run", where=place, resume=True)
    pd.testing.assert_frame_equal(again.stages(), view.stages())
    with pytest.raises(UserError, match="the least is 7"):  # all of them: a mistake in the configuration
        run_experiment(config(tiny_experiment, stages, heavy1=mine, heavy2=mine), place / "none", where=place)


def test_a_stage_that_failed_is_not_run_again_on_resuming(
    place: Path, tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"source": "own_networks:network"}
    stages = [TRAIN | {"epochs": 1}, DIVERGE]
    view = run_experiment(config(tiny_experiment, stages, a=mine, b=mine), place / "run", where=place)

    def again(*_: Any) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr("tests_compress_parts.Diverge.run", again)
    resumed = run_experiment(view.config, place / "run", where=place, resume=True)
    pd.testing.assert_frame_equal(resumed.stages(), view.stages())


class Killed(BaseException):
    """As if the process had ended."""


@pytest.mark.parametrize("moment", ["run", "record_stage", "add_metrics"])
def test_killed_at_every_stage_a_run_ends_as_if_it_had_not_been(
    place: Path, tiny_experiment: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nasbench.archive import Archive
    from nasbench.stages.export import Export
    from nasbench.stages.finetune import FineTune

    stages = [TRAIN | {"epochs": 1}, HALVE, {"name": "export"}]
    given = config(tiny_experiment, stages)
    whole = results(run_experiment(given, place / "whole", where=place).path)
    path = place / "killed"
    kills = 0
    for _ in range(4):
        with monkeypatch.context() as patch:
            calls = 0

            def dying(original: Any) -> Any:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal calls
                    result = original(*arguments, **options)
                    calls += 1
                    if calls == 1:
                        raise Killed
                    return result

                return call

            if moment == "run":
                for cls in (FineTune, Export):
                    patch.setattr(cls, "run", dying(cls.run))
            else:
                patch.setattr(Archive, moment, dying(getattr(Archive, moment)))
            try:
                run_experiment(given, path, where=place, resume=path.exists())
            except Killed:
                kills += 1
    assert kills >= 2
    run_experiment(given, path, where=place, resume=True)
    pd.testing.assert_frame_equal(results(path), whole)


def test_the_trap_is_told_where_operations_fall_and_time_does_not() -> None:
    rows = pd.DataFrame(
        {
            "network": ["a", "a", "b", "b"],
            "step": [0, 1, 0, 1],
            "macs": [100.0, 50.0, 100.0, 95.0],
            "latency_ms@host:fp32": [1.0, 1.02, 1.0, 1.1],
        }
    )
    found = ratios(rows, "host:fp32")
    assert found["trap"].tolist() == [False, True, False, False]
    assert found["macs"].tolist() == [1.0, 0.5, 1.0, 0.95]


def test_weights_are_loaded_and_others_refused(place: Path, tiny_experiment: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    save_file(network.state_dict(), place / "good.safetensors")
    save_file({"x": torch.zeros(2)}, place / "bad.safetensors")
    good = config(tiny_experiment, [], mine={"source": "own_networks:network", "weights": "good.safetensors"})
    rows = run_experiment(good, place / "good", where=place).stages()
    assert rows["stage"].tolist() == ["given"]
    bad = config(tiny_experiment, [], mine={"source": "own_networks:network", "weights": "bad.safetensors"})
    with pytest.raises(UserError, match=r"networks\.mine: .*bad\.safetensors: of another network"):
        run_experiment(bad, place / "bad", where=place)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet81", "no network 'resnet81'.*resnet18"),
        ("own_networks:netwrk", "cannot import"),
        ("own_networks:broken", "RuntimeError: no such thing"),
        ("own_networks:number", "returned a int; a torch.nn.Module was expected"),
        ("quickstart:tiniest", "neither choice indices nor a reference"),
        ("missing.onnx", "no such file"),
    ],
)
def test_networks_that_are_none_are_refused_by_name(
    place: Path, tiny_experiment: Path, source: str, message: str
) -> None:
    given = config(tiny_experiment, [TRAIN] if not source.endswith("onnx") else [], mine={"source": source})
    with pytest.raises(UserError, match=message):
        run_experiment(given, place / "run", where=place)


def test_impossible_orders_are_refused_before_anything_runs(place: Path, tiny_experiment: Path) -> None:
    for stages in ([{"name": "export"}, TRAIN], [{"name": "quantize"}, HALVE]):
        with pytest.raises(UserError, match=r"takes a float module, but the step before it gives a runtime artifact"):
            run_experiment(config(tiny_experiment, stages), place / "run", where=place)
    assert not (place / "run").exists()
    with pytest.raises(UserError, match=r"stages\.0\.stop_if_accuracy_falls"):
        config(tiny_experiment, [TRAIN | {"stop_if_accuracy_falls": -1}])
    with pytest.raises(UserError, match="part of file names"):
        config(tiny_experiment, [TRAIN], **{"../up": {"source": "resnet18"}})


def test_networks_from_the_command_line_get_names(tiny_experiment: Path) -> None:
    base = load_config(tiny_experiment)
    made = with_networks(base, ["resnet18@28", "mine=own:network", "some/net.onnx"])
    assert list(made.networks) == ["resnet18-28", "mine", "net"]
    with pytest.raises(UserError, match="two networks are called 'a'"):
        with_networks(base, ["a=resnet18", "a=resnet34"])
    with pytest.raises(UserError, match="weights are of one network"):
        with_networks(base, ["resnet18", "resnet34"], "w.safetensors")
    with pytest.raises(UserError, match="nothing to do"):
        with_networks(base.model_copy(update={"stages": []}), ["resnet18"])
