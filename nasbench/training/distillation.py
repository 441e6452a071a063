"""What a student may learn of a teacher beside its logits: feature maps and where it attends.

FitNets (Romero et al., ICLR 2015) bring features of the student to the teacher's by a learned 1x1 projection; attention
transfer (Zagoruyko and Komodakis, ICLR 2017) compares where both respond, whatever their widths. Of transformers the
maps are those of their attention, as `scaled_dot_product_attention` or a softmax gives them (Wang et al., MiniLM, 2020,
compare these too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nasbench.training.evaluation import fit_size
from search_spaces.errors import UserError, nearest

POINTS = 3  # of a network that are compared where none are named


def attention_map(features: Tensor) -> Tensor:
    """Where a feature map `(n, c, h, w)` responds: mean square over channels, `(n, h * w)`, of unit length."""
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of attention maps (eq. 2 of Zagoruyko and Komodakis, squared).

    Args:
        student, teacher: feature maps `(n, c, h, w)`; the teacher's is brought to the student's size.
    """
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean()


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of feature maps `(n, c, h, w)` or tokens `(n, t, c)`, over the teacher's mean square."""
    if teacher.shape != student.shape and teacher.ndim == 4:
        teacher = F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    elif teacher.shape != student.shape:
        teacher = F.adaptive_avg_pool1d(teacher.transpose(1, 2), student.shape[1]).transpose(1, 2)
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)


class Watched:
    """A network whose outputs of some submodules, and attention, are kept as it runs.

    Args:
        points: dotted names of submodules; empty: the last at each resolution, or the blocks of a transformer.
        attention: keep attention probabilities too, `(n, heads, tokens, tokens)`.
        sample: `(n, c, h, w)` input to find what there is.

    Raises:
        UserError: no such submodule, or one without a feature map.
    """

    def __init__(self, network: nn.Module, points: Sequence[str], attention: bool, sample: Tensor) -> None:
        self.network, self.attention = network, attention
        self.features: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []
        modules, kind = dict(network.named_modules()), type(network).__name__
        for name in points:
            if name not in modules or not name:
                raise UserError(f"{kind}: no layer {name!r}. {nearest(name, list(modules)[1:])[:200]}")
        self._handles = self._watch(points or list(modules)[1:], modules)
        mode = network.training
        network.eval()
        with torch.no_grad():
            self(sample)
        network.train(mode)
        for name in points:
            if name not in self.features:
                raise UserError(f"{kind}: layer {name!r} gives no feature map (n, c, h, w) or (n, t, c)")
        self.points = list(points) or _stages(self.features)
        self.shapes = {name: self.features[name].shape for name in self.points}
        self.attentions = len(self.maps)
        self.release()
        self._handles = self._watch(self.points, modules)

    def release(self) -> None:
        """Watch no more: the network is as it was."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget what the last run kept."""
        self.features, self.maps = {}, []

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output; what is watched is kept until the next call."""
        self.clear()
        if not self.attention:
            logits: Tensor = self.network(x)
            return logits
        with _Attention() as seen:
            logits = self.network(x)
        self.maps = seen.maps
        return logits

    def _watch(self, names: Sequence[str], modules: dict[str, nn.Module]) -> list[Any]:
        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.ndim in (3, 4) and output.is_floating_point():
                    self.features[name] = output

            return hook

        return [modules[name].register_forward_hook(keep(name)) for name in names]


class _Attention(TorchFunctionMode):
    """Keeps the probabilities of attention as they are computed, or computes them where only their use is."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.maps.append((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
        elif getattr(func, "__name__", "") == "softmax" and result.ndim == 4 and result.shape[2] == result.shape[3]:
            self.maps.append(result)
        return result


def _stages(features: dict[str, Tensor]) -> list[str]:
    """The last feature map at each resolution, fewest pixels last; of a transformer the last of each shape."""
    maps = {name: f for name, f in features.items() if f.ndim == 4 and f.shape[2] * f.shape[3] > 1}
    if maps:
        last = {tuple(f.shape[2:]): name for name, f in maps.items()}
        return list(dict.fromkeys(name for name in maps if name in last.values()))
    blocks = [name for name, f in features.items() if f.ndim == 3]
    if not blocks:
        return []
    depth = min(name.count(".") for name in blocks)
    top = [name for name in blocks if name.count(".") == depth]
    nested = [name for name in blocks if name.count(".") == depth + 1 and name.rpartition(".")[2].isdigit()]
    return nested or top


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced, the last one among them."""
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


class Imitation(nn.Module):
    """A student that is trained with what it must imitate, and the projections that are learned for it alone.

    Called as the student; `loss` is what the last call differs from the teacher by.

    Args:
        student, teacher: the teacher is not a part of this module, and stays as it is.
        feature_weight, attention_weight: of both terms; 0 leaves one out.
        layers: pairs of names, (of the student, of the teacher); empty: resolutions are paired from the last.
        sample: `(n, c, h, w)` prepared images of the task's size.
        student_shape, teacher_shape: `(channels, height, width)` that both take.

    Raises:
        UserError: layers that do not exist, or nothing to compare.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        feature_weight: float,
        attention_weight: float,
        layers: Sequence[tuple[str, str]],
        sample: Tensor,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.student = student
        self.feature_weight, self.attention_weight = feature_weight, attention_weight
        attention = attention_weight > 0
        mine = Watched(student, [s for s, _ in layers], attention, fit_size(sample, student_shape))
        theirs = Watched(teacher, [t for _, t in layers], attention, fit_size(sample, teacher_shape))
        self.teacher_shape = tuple(teacher_shape)
        self._watched = mine, theirs  # a tuple: the teacher is no submodule
        self.pairs = list(layers) or _paired(mine, theirs)
        names = f"{type(student).__name__} and its teacher {type(teacher).__name__}"
        attended = attention and mine.attentions and theirs.attentions
        if not self.pairs and (feature_weight or (attention and not attended)):
            raise UserError(f"{names}: no feature maps or tokens to compare; name layers")
        for s, t in self.pairs:
            if len(mine.shapes[s]) != len(theirs.shapes[t]):
                raise UserError(f"layers {s!r} and {t!r}: one gives a feature map and the other tokens")
        projections: list[nn.Module] = []
        for s, t in self.pairs if feature_weight else []:
            if len(mine.shapes[s]) == 4:
                projections.append(nn.Conv2d(mine.shapes[s][1], theirs.shapes[t][1], 1))
            else:
                projections.append(nn.Linear(mine.shapes[s][2], theirs.shapes[t][2]))
        self.projections = nn.ModuleList(projections)
        self._asked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._watched[0](x)
        return logits

    def release(self) -> nn.Module:
        """The student alone, watched no more."""
        for watched in self._watched:
            watched.release()
        return self.student

    def ask(self, x: Tensor) -> Tensor:
        """The teacher's logits for prepared images of the task's size; what it kept belongs to them."""
        with torch.no_grad():
            self._asked, logits = x, self._watched[1](fit_size(x, self.teacher_shape))
        return logits

    def loss(self, x: Tensor) -> Tensor:
        """Weighted terms beside the logits', for the images that the student was last called with."""
        if self._asked is not x:
            self.ask(x)
        mine, theirs = self._watched
        total = x.new_zeros(())
        if self.feature_weight:
            hints = [
                hint_loss(project(mine.features[s]), theirs.features[t])
                for project, (s, t) in zip(self.projections, self.pairs, strict=True)
            ]
            total = total + self.feature_weight * torch.stack(hints).mean()
        if self.attention_weight:
            total = total + self.attention_weight * self._attention(mine, theirs)
        return total

    def _attention(self, mine: Watched, theirs: Watched) -> Tensor:
        if mine.maps and theirs.maps:
            count = min(len(mine.maps), len(theirs.maps))
            terms = []
            for s, t in zip(spread(mine.maps, count), spread(theirs.maps, count), strict=True):
                if s.shape[2:] != t.shape[2:]:
                    raise UserError(
                        f"attention of {s.shape[2]} tokens cannot be compared with one of {t.shape[2]}; take a teacher "
                        "of the same resolution and patch, or features alone"
                    )
                if torch.is_grad_enabled() and not s.requires_grad:
                    raise UserError(f"{type(self.student).__name__}: its attention gives no gradient; take features")
                terms.append((s.mean(1) - t.mean(1)).square().sum((1, 2)).mean() / s.shape[2])
            return torch.stack(terms).mean()
        terms = [
            attention_loss(mine.features[s], theirs.features[t])
            for s, t in self.pairs
            if mine.features[s].ndim == 4 and theirs.features[t].ndim == 4
        ]
        if not terms:
            raise UserError(f"{type(self.student).__name__} and its teacher: neither maps nor attention to compare")
        return torch.stack(terms).mean()


def _paired(mine: Watched, theirs: Watched) -> list[tuple[str, str]]:
    """Feature maps of both from the last backwards; of transformers blocks evenly spaced."""
    kinds = {len(mine.shapes[p]) for p in mine.points}, {len(theirs.shapes[p]) for p in theirs.points}
    count = min(len(mine.points), len(theirs.points), POINTS)
    if not count or kinds[0] != kinds[1]:
        return []
    if kinds[0] == {4}:
        return list(zip(mine.points[-count:], theirs.points[-count:], strict=True))
    return list(zip(spread(mine.points, count), spread(theirs.points, count), strict=True))
