"""Training by several processes of torch's launcher: the same weights as by one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nasbench.config import Config
from nasbench.experiment import run_experiment
from nasbench.tasks.array_task import Dataset
from nasbench.tasks.base import Split
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import ProgressCallback, Update, train_supernet
from nasbench.training.processes import joined
from search_spaces import AutoFormerSpace, MobileNetV3Space, SearchSpace, Supernet, UserError
from search_spaces.synchronised import batch_norm_of_all

ROOT = Path(__file__).parents[2]


class SomeImages(FashionMNIST):
    def load(self) -> Dataset:
        full = super().load()
        return Dataset({n: Split(s.images[:128], s.labels[:128]) for n, s in full.splits.items()}, full.class_names)


def vit() -> SearchSpace:
    return AutoFormerSpace(
        1, 10, widths=[16, 24], depths=[1, 2], heads=[1, 2], ratios=[1, 2], head_width=8, resolution=28, patch=7,
        max_relative_position=3, dropout=0.0, drop_path=0.0,
    )  # fmt: skip


def cnn() -> SearchSpace:
    stages = [{"width": 8, "kernels": [3, 5], "expansions": [2, 3], "depths": [1, 2], "stride": 2}]
    return MobileNetV3Space(1, 10, stages=stages, resolutions=[14, 28], final_width=16, feature_width=16)


CASES = {
    "vit, sandwich": (vit, {"method": "sandwich", "optimizer": "adamw", "lr": 1e-3, "momentum": 0.9}),
    "vit, shrinking": (vit, {"method": "progressive_shrinking", "lr": 0.02, "ema": 0.9}),
    "cnn, sandwich": (cnn, {"method": "sandwich", "distillation": "alpha", "lr": 0.05}),
    "cnn, single path": (cnn, {"method": "single_path", "lr": 0.05}),
}


def train(
    case: str, checkpoint: Path | None, progress: ProgressCallback | None = None
) -> tuple[Supernet, list[dict[str, float]]]:
    """As every process does, and as one alone does."""
    torch.set_num_threads(1)
    make, options = CASES[case]
    space = make()
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # those that join take the first one's weights
    supernet = space.supernet()
    common = {"batch_size": 32, "epochs": 2, "validation_images": 64, "progress": progress}
    return supernet, train_supernet(supernet, space, SomeImages(), **common, **options, checkpoint=checkpoint)


def launch(*arguments: object, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(a) for a in command], capture_output=True, text=True, timeout=300, env=environment, cwd=where
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes left the checkpoints of all cases, trained in one launch."""
    directory = tmp_path_factory.mktemp("launched")
    done = launch(__file__, directory, where=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(launched: Path, case: str) -> None:
    """Up to rounding, which batch normalisation of small batches magnifies from step to step."""
    supernet, history = train(case, None)
    weights = torch.load(launched / f"{case}.0.pt", weights_only=True)
    start = CASES[case][0]
    torch.manual_seed(0)
    before = start().supernet().state_dict()
    for name, tensor in supernet.state_dict().items():
        moved = float((tensor - before[name]).abs().max())
        assert (
            float((tensor - weights["model"][name]).abs().max()) <= 2e-6 + (0.1 if "cnn" in case else 0.01) * moved
        ), name
    assert weights["loss"] == pytest.approx([row["loss"] for row in history], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_all_processes_end_with_the_same_weights(launched: Path, case: str) -> None:
    first, second = (torch.load(launched / f"{case}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(t, second["model"][n]) for n, t in first["model"].items())
    assert first["loss"] == second["loss"]


def test_batch_normalisation_over_two_processes_is_that_of_the_whole_batch(launched: Path) -> None:
    x, weight, bias = normalised()
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    y.pow(3).mean().backward()
    first, second = (torch.load(launched / f"normalised.{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach())
    # Of the mean of the two losses, to which each half of the images has half a share.
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]) / 2, x.grad)
    torch.testing.assert_close(first["affine"], [weight.grad, bias.grad])


def test_the_first_process_alone_writes_checkpoints(launched: Path) -> None:
    assert {p.name for p in launched.glob("*.safetensors")} == {f"{case}.safetensors" for case in CASES}


def test_a_run_is_for_the_first_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="first process"):
        run_experiment(Config(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_launched_experiment_trains_together_and_leaves_one_run(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(
        """
        task.name = "fashion_mnist"
        supernet = {epochs = 1, batch_size = 3000, lr = 0.05, method = "single_path", validation_images = 16}
        evaluator = {name = "supernet", samples = 0, verify = 2, calibration_images = 32, validation_images = 64}
        objectives = {accuracy = {}, macs = {}}
        strategy = {name = "random", evaluations = 4, seed_references = false}
        selection.count = 1
        [space]
        name = "mobilenet_v3"
        stages = [{width = 8, kernels = [3, 5], expansions = [2, 3], depths = [1], stride = 2}]
        resolutions = [14]
        final_width = 16
        feature_width = 16
        """
    )
    done = launch("-m", "nasbench", "run", "e.toml", "--output", "run", "--quiet", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("networks on the verified front") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.toml", "run"]
    assert (tmp_path / "run" / "training.csv").is_file()


def normalised() -> list[torch.Tensor]:
    """Images, scales and shifts."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 3, 5, 5), (3,), (3,))
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def stopped(case: str, path: Path | None) -> None:
    """Stop both processes by Ctrl-C at the first of them: what follows resumes."""
    steps = 5 if path is not None else -1

    def interrupt(update: Update) -> None:
        if update.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(case, path, interrupt)


def main(directory: Path) -> None:
    """One of the launched processes."""
    rank = int(os.environ["RANK"])
    for case in CASES:
        path = directory / f"{case}.safetensors" if rank == 0 else None  # no other needs to know
        stopped(case, path)
        supernet, history = train(case, path)
        result = {"model": supernet.state_dict(), "loss": [row["loss"] for row in history]}
        torch.save(result, directory / f"{case}.{rank}.pt")
    with joined(torch.device("cpu")) as ranks:
        x, *affine = normalised()
        half = x[4 * rank : 4 * rank + 4].detach().requires_grad_()
        y = batch_norm_of_all(half, affine[0], affine[1], 1e-5)
        y.pow(3).mean().backward()
        ranks.mean_([a.grad for a in affine if a.grad is not None])
    result = {"y": y.detach(), "x": half.grad, "affine": [a.grad for a in affine]}
    torch.save(result, directory / f"normalised.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
