"""Ways to learn from a stream: bounds, replay, regularisation, and a classifier that needs no training."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nasbench.ondevice.continual import UNMET, ContinualMethod, Training
from nasbench.ondevice.methods import head
from nasbench.ondevice.replay import Policy, ReplayBuffer, from_int8, to_int8
from nasbench.tasks.base import Split, SplitName, Task
from nasbench.tasks.part import PartOfTask
from nasbench.training.loop import Batch, BrokeDown, step_seed
from nasbench.training.losses import soft_loss
from search_spaces.errors import UserError, nearest

_AT_ONCE = 256  # samples per forward pass without gradient


class FineTuning(ContinualMethod):
    """Trains on what comes, and forgets: the lower bound. Others add to its loss."""

    name = "fine-tuning"

    def learn(self, task: Task, step: int) -> None:
        self.descend(task, step)

    def descend(self, task: Task, step: int, free_statistics: bool = False) -> None:
        """Train on a task's data by `loss`."""
        met = self.among(task)

        def backward(batch: Batch) -> dict[str, float]:
            loss = self.loss(task, batch, met)
            loss.backward()
            return {"loss": float(loss.detach())}

        self.run(task, step, backward, free_statistics)

    def loss(self, task: Task, batch: Batch, met: Tensor) -> Tensor:
        """The loss of a batch; only classes met so far compete."""
        logits = self.network(self.prepare(task, batch.images)).float()
        return task.loss(logits.masked_fill(~met, UNMET), batch.labels)


class Joint(FineTuning):
    """Trains on all data met so far at every step, as if it were never gone: the upper bound."""

    name = "joint"

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        self._tasks: list[Task] = []

    def learn(self, task: Task, step: int) -> None:
        splits = [t.split("train") for t in (*self._tasks, task)]
        together = Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))
        name: SplitName = "train"
        self.descend(PartOfTask(task, {name: together}), step, free_statistics=True)

    def remember(self, task: Task, step: int) -> None:
        super().remember(task, step)
        self._tasks.append(task)

    @property
    def memory_bytes(self) -> int:
        return sum(t.split("train").images.nbytes + t.split("train").labels.nbytes for t in self._tasks)


class Replay(FineTuning):
    """Every batch has as many stored samples as new ones (experience replay; Chaudhry et al. 2019).

    Args:
        memory_bytes: for samples as the task stores them, and labels of 16 bits.
        policy: which are kept, see `ReplayBuffer`.
    """

    name = "replay"

    def __init__(
        self, training: Training | None = None, *, memory_bytes: int = 128 * 1024, policy: Policy = "balanced"
    ) -> None:
        super().__init__(training)
        self._make = lambda: ReplayBuffer(memory_bytes, policy, step_seed(self.training.seed, "replay", 0))
        self._make()

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        self.buffer = self._make()

    def remember(self, task: Task, step: int) -> None:
        super().remember(task, step)
        split = task.split("train")
        order = _order(len(split), self.training.seed, step)
        self.buffer.add({"images": split.images[order], "labels": split.labels[order].short()})

    @property
    def memory_bytes(self) -> int:
        return self.buffer.nbytes

    def loss(self, task: Task, batch: Batch, met: Tensor) -> Tensor:
        old = self.drawn(batch)
        x = self.prepare(task, batch.images)
        if not old:
            return task.loss(self.network(x).float().masked_fill(~met, UNMET), batch.labels)
        images = task.augment(old["images"], step_seed(self.training.seed, "replay", batch.step))
        logits = self.network(torch.cat([x, self.prepare(task, images)])).float()
        return task.loss(logits.masked_fill(~met, UNMET), torch.cat([batch.labels, old["labels"].long()]))

    def drawn(self, batch: Batch) -> dict[str, Tensor]:
        """Stored samples for a batch, as many as it has itself."""
        if not len(self.buffer):
            return {}
        return self.buffer.draw(
            len(batch.labels), step_seed(self.training.seed, f"draw-{int(self.met.sum())}", batch.step)
        )


class LatentReplay(Replay):
    """Replays activations instead of inputs; what lies before them is frozen (Pellegrini et al., IROS 2020).

    The part up to `layer` learns from the first task alone, then stays, so that stored activations stay true and no
    gradient goes there. Augmentation changes new samples only.

    Args:
        layer: dotted name of the module whose output is stored. Everything must flow through it.
        int8: store bytes, with a scale and an offset a sample, so that four times as many fit.
    """

    name = "latent replay"

    def __init__(
        self, layer: str, training: Training | None = None, *, memory_bytes: int = 128 * 1024,
        policy: Policy = "balanced", int8: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(training, memory_bytes=memory_bytes, policy=policy)
        self.layer = layer
        self.int8 = int8

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        known = [name for name, _ in self.network.named_modules() if name]
        if self.layer not in known:
            raise UserError(f"layer = {self.layer!r}: no such module. {nearest(self.layer, known)}")
        self._check()

    def remember(self, task: Task, step: int) -> None:
        ContinualMethod.remember(self, task, step)
        for module in self._lower:
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        split = task.split("train")
        order = _order(len(split), self.training.seed, step)
        for rows in order.split(_AT_ONCE):
            found = self._latent(self.prepare(task, split.images[rows]))
            columns = to_int8(found) if self.int8 else {"values": found}
            self.buffer.add(columns | {"labels": split.labels[rows].short()})

    def loss(self, task: Task, batch: Batch, met: Tensor) -> Tensor:
        old = self.drawn(batch)
        if self.started:
            for module in self._lower:
                module.eval()
        x = self.prepare(task, batch.images)
        if not old:
            return task.loss(self.network(x).float().masked_fill(~met, UNMET), batch.labels)
        latent = from_int8(old) if self.int8 else old["values"]
        handle = self._at(lambda out: torch.cat([out, latent]))
        try:
            logits = self.network(x).float()
        finally:
            handle.remove()
        return task.loss(logits.masked_fill(~met, UNMET), torch.cat([batch.labels, old["labels"].long()]))

    def _at(self, change: object) -> RemovableHandle:
        return self.network.get_submodule(self.layer).register_forward_hook(lambda m, args, out: change(out))  # type: ignore[operator]

    @torch.no_grad()
    def _latent(self, x: Tensor) -> Tensor:
        """The output of the layer; what comes after it does not run."""

        def stop(out: Tensor) -> None:
            raise _Reached(out)

        self.network.eval()
        handle = self._at(stop)
        try:
            self.network(x)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise UserError(f"layer = {self.layer!r}: the network does not run it")

    def _check(self) -> None:
        """Find what runs before the cut, and refuse a layer that something flows past."""
        ran: list[nn.Module] = []
        handles = [
            m.register_forward_hook(lambda m, args, out: ran.append(m)) for m in self.network.modules()
        ]  # fmt: skip
        x = torch.zeros(2, *self.input_shape)
        try:
            one = self._latent(x)
        finally:
            for handle in handles:
                handle.remove()
        self._lower = list(dict.fromkeys(ran))
        handle = self._at(lambda out: torch.cat([out, one]))
        try:
            with torch.no_grad():
                rows = len(self.network(x))
        except RuntimeError:
            rows = 0
        finally:
            handle.remove()
        if rows != 4:
            raise UserError(
                f"layer = {self.layer!r}: something flows past it, so that its output alone does not give the result; "
                "choose a layer at the end of a block"
            )


class _Reached(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


class EWC(FineTuning):
    """Weights that mattered are held in place (online elastic weight consolidation).

    Kirkpatrick et al. (PNAS 2017), with one running Fisher information and one anchor instead of a pair per task
    (Schwarz et al., ICML 2018). The diagonal Fisher information is the mean squared gradient of the log-likelihood of
    labels that are drawn from the network's own output.

    Args:
        strength: lambda, of the penalty `lambda / 2 * sum(F * (w - anchor)^2)`.
        decay: of the Fisher information of earlier tasks, 0..1.
        samples: of a task from which it is estimated, one by one.
    """

    name = "EWC"

    def __init__(
        self, training: Training | None = None, *, strength: float = 100.0, decay: float = 1.0, samples: int = 200
    ) -> None:
        super().__init__(training)
        rules = {
            "strength": (strength, strength >= 0, "0 or more"),
            "decay": (decay, 0 <= decay <= 1, "a share in 0..1"),
            "samples": (samples, samples >= 1, "1 or more"),
        }
        for key, (value, right, expected) in rules.items():
            if not right:
                raise UserError(f"{key} = {value}: expected {expected}")
        self.strength, self.decay, self.samples = strength, decay, samples

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def loss(self, task: Task, batch: Batch, met: Tensor) -> Tensor:
        loss = super().loss(task, batch, met)
        if self.fisher:
            parts = [
                (self.fisher[n] * (p - self.anchor[n]).square()).sum()
                for n, p in self.network.named_parameters()
                if n in self.fisher
            ]
            loss = loss + 0.5 * self.strength * torch.stack(parts).sum()
        return loss

    def remember(self, task: Task, step: int) -> None:
        super().remember(task, step)
        self.network.eval()
        parameters = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        images = task.split("train").images
        rows = _order(len(images), self.training.seed, step)[: self.samples]
        generator = torch.Generator().manual_seed(step_seed(self.training.seed, "fisher", step))
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for row in rows.tolist():
            log = self.logits(self.prepare(task, images[row : row + 1])).log_softmax(1)
            label = torch.multinomial(log.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log.gather(1, label).sum(), list(parameters.values()), allow_unused=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.square() / len(rows)
        for name, total in found.items():
            self.fisher[name] = total + self.decay * self.fisher.get(name, torch.zeros(()))
        self.anchor = {name: p.detach().clone() for name, p in parameters.items()}

    @property
    def memory_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.fisher.values(), *self.anchor.values()))


class LwF(FineTuning):
    """The network of the step before teaches its classes on new images (learning without forgetting; Li & Hoiem 2016).

    Labels are learned among all classes met so far, and the teacher speaks of those that it knows.

    Args:
        weight: of the teacher's loss beside that of the labels.
        temperature: of both outputs.
    """

    name = "LwF"

    def __init__(self, training: Training | None = None, *, weight: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__(training)
        if weight < 0 or not temperature > 0:
            raise UserError(f"weight = {weight}, temperature = {temperature}: expected 0 or more, and above 0")
        self.weight, self.temperature = weight, temperature

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        self.teacher: nn.Module | None = None

    def remember(self, task: Task, step: int) -> None:
        super().remember(task, step)
        self.teacher = copy.deepcopy(self.network).eval()

    def loss(self, task: Task, batch: Batch, met: Tensor) -> Tensor:
        if self.teacher is None:
            return super().loss(task, batch, met)
        x = self.prepare(task, batch.images)
        logits = self.network(x).float()
        loss = task.loss(logits.masked_fill(~met, UNMET), batch.labels)
        with torch.no_grad():
            target = self.teacher(x).float()[:, self.met]
        return loss + self.weight * soft_loss(logits[:, self.met], target, self.temperature)

    @property
    def memory_bytes(self) -> int:
        """The teacher: its weights and statistics."""
        return 0 if self.teacher is None else sum(t.nbytes for t in self.teacher.state_dict().values())


class StreamingLDA(FineTuning):
    """Linear discriminant analysis of a frozen network's features, sample after sample (deep SLDA; Hayes & Kanan 2020).

    The network learns from the first task alone. Features are what its last layer takes: a running mean for every class
    and one covariance within classes, kept exactly as if all samples were there at once (the paper weighs a sample's
    outer product by the samples of all classes, here it is by those of its own).

    Args:
        shrinkage: of the covariance towards the identity, epsilon in the paper.
    """

    name = "streaming LDA"

    def __init__(self, training: Training | None = None, *, shrinkage: float = 1e-4) -> None:
        super().__init__(training)
        if not 0 < shrinkage <= 1:
            raise UserError(f"shrinkage = {shrinkage}: expected above 0, up to 1")
        self.shrinkage = shrinkage

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        super().begin(network, input_shape, classes)
        self.mean = torch.zeros(0)
        self.scatter = torch.zeros(0)
        self.count = torch.zeros(classes, dtype=torch.int64)

    def learn(self, task: Task, step: int) -> None:
        if not self.started:
            super().learn(task, step)

    @torch.no_grad()
    def remember(self, task: Task, step: int) -> None:
        super().remember(task, step)
        self._features = copy.deepcopy(self.network).eval()
        self._features.set_submodule(head(self.network), nn.Identity())
        split = task.split("train")
        for start in range(0, len(split), _AT_ONCE):
            images, labels = split.images[start : start + _AT_ONCE], split.labels[start : start + _AT_ONCE]
            features = self._features(self.prepare(task, images)).flatten(1)
            if not bool(torch.isfinite(features).all()):
                raise BrokeDown("features are not finite")
            self.observe(features, labels)
        covariance = self.scatter / max(1, int(self.count.sum()) - 1)
        mixed = (1 - self.shrinkage) * covariance + self.shrinkage * torch.eye(len(covariance))
        self._weight = torch.linalg.solve(mixed, self.mean.T).T
        self._bias = -0.5 * (self._weight * self.mean).sum(1)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in features `(n, d)`; in any portions and order, the result is the same."""
        if not len(self.mean):
            self.mean = features.new_zeros(len(self.met), features.shape[1])
            self.scatter = features.new_zeros(features.shape[1], features.shape[1])
        for label in labels.unique().tolist():
            own = features[labels == label]
            old, new = int(self.count[label]), len(own)
            apart = own.mean(0) - self.mean[label]
            centred = own - own.mean(0)
            self.scatter += centred.T @ centred + old * new / (old + new) * torch.outer(apart, apart)
            self.mean[label] += apart * new / (old + new)
            self.count[label] += new

    def logits(self, x: Tensor) -> Tensor:
        out = self._features(x).flatten(1) @ self._weight.T + self._bias
        return out.masked_fill(~self.met, UNMET)

    @property
    def memory_bytes(self) -> int:
        return self.mean.nbytes + self.scatter.nbytes + self.count.nbytes


def _order(count: int, seed: int, step: int) -> Tensor:
    """In which order samples of a step are met when they are remembered."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, "remember", step)))
