"""Distillation: each term teaches what it says, from any teacher, and what cannot be taught is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.distill import Distill
from nasbench.stages.teachers import make_teacher
from nasbench.training import load_weights, predict_logits, save_weights
from nasbench.training.distillation import Imitation, attention_loss, hint_loss, spread
from nasbench.training.evaluation import fit_size
from search_spaces import UserError, load_space, reference_network


@pytest.fixture
def context(space, task, trained, tmp_path):
    return StageContext(task, space, tmp_path / "knee", seed=0, supernet=trained, input_shape=(1, 32, 32))


@pytest.fixture
def candidate(space, task, trained):
    arch = np.array([0, 1, 0, 1], dtype=space.dtype)
    return Candidate("knee", arch, Form.FLOAT, network=SupernetEvaluator(space, task, trained).extract(arch))


def _imitation(student, teacher, features=0.0, attention=0.0, layers=(), shape=(1, 32, 32)):
    return Imitation(
        student,
        teacher,
        feature_weight=features,
        attention_weight=attention,
        layers=layers,
        sample=torch.randn(2, *shape),
        student_shape=shape,
        teacher_shape=shape,
    )


def _vit(**options):
    torch.manual_seed(options.pop("seed", 0))
    return reference_network("deit_tiny", resolution=32, in_channels=1, num_classes=10).build()


def test_equal_maps_and_features_cost_nothing_and_scale_does_not_matter():
    x = torch.randn(3, 4, 5, 5)
    assert float(attention_loss(x, x)) == 0
    assert float(attention_loss(x, 7 * x)) == pytest.approx(0, abs=1e-6)
    assert float(hint_loss(x, x)) == 0
    assert float(hint_loss(torch.zeros_like(x), x)) == pytest.approx(1)
    assert float(attention_loss(torch.randn(3, 2, 5, 5), torch.randn(3, 9, 10, 10))) > 0
    assert spread([1, 2, 3, 4, 5, 6], 3) == [2, 4, 6]


@pytest.mark.parametrize(("features", "attention"), [(1.0, 0.0), (0.0, 100.0)])
def test_a_student_comes_to_see_what_its_teacher_sees(candidate, context, task, features, attention):
    def far(network):
        teacher, _ = make_teacher(["supernet"], [], {"epochs": 0}, context)
        imitation = _imitation(network, teacher, 0.0, 1.0)
        x = task.prepare(task.split("val").images[:100])
        with torch.no_grad():
            imitation(nn.functional.interpolate(x, (32, 32), mode="bilinear"))
            return float(imitation.loss(x))

    stage = Distill(
        epochs=4, lr=0.05, batch_size=40, logits_weight=0.0, feature_weight=features, attention_weight=attention
    )
    result = stage.run(candidate, context)
    assert result.form is Form.FLOAT
    assert type(result.network) is type(candidate.network)
    assert not any(m._forward_hooks for m in result.network.modules())
    assert far(result.network) < (far(candidate.network) if attention else 1.0)
    said = json.loads((context.directory / "knee-distill.json").read_text())
    assert said["teacher_accuracy"] > 0.3
    assert said["layers"]
    assert said["history"][-1]["loss"] < said["history"][0]["loss"]


def test_logits_of_the_teacher_are_what_is_learned(candidate, context, task):
    result = Distill(epochs=4, lr=0.05, batch_size=40, logits_weight=1.0).run(candidate, context)
    teacher, shape = make_teacher(["supernet"], [], {"epochs": 0}, context)
    images = task.split("train").images
    wanted = predict_logits(teacher, task, images, shape).softmax(1)

    def apart(network):
        return float((predict_logits(network, task, images, (1, 32, 32)).softmax(1) - wanted).square().mean())

    assert apart(result.network) < apart(candidate.network)


def test_attention_of_transformers_is_compared_as_such():
    student, teacher = _vit(), _vit(seed=1)
    imitation = _imitation(student, teacher, attention=1.0)
    x = torch.randn(2, 1, 32, 32)
    imitation(x)
    loss = imitation.loss(x)
    assert len(imitation._watched[0].maps) == len(imitation._watched[1].maps) > 3
    loss.backward()
    assert float(loss.detach()) > 0
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in student.parameters())
    same = _imitation(teacher, teacher, attention=1.0)
    same(x)
    assert float(same.loss(x)) == pytest.approx(0, abs=1e-6)


def test_a_reference_network_is_trained_once_and_an_ensemble_is_the_mean(candidate, context, task):
    training = {"epochs": 1, "lr": 0.05, "batch_size": 40}
    alone, _ = make_teacher(["mobilenet_v2_0.35@32"], [], training, context)
    kept = context.directory.parent / "teacher-mobilenet_v2_0.35@32.safetensors"
    assert load_weights(alone, kept)["accuracy"] > 0
    stage = Distill(
        teacher=["supernet", "mobilenet_v2_0.35@32"], epochs=1, batch_size=40, teacher_epochs=0, logits_weight=0.5
    )
    both, size = make_teacher(stage.teachers, [], stage.teacher_training, context)
    x = task.prepare(task.split("val").images[:5])
    largest, _ = make_teacher(["supernet"], [], training, context)
    bigger = nn.functional.interpolate(x, (32, 32), mode="bilinear", align_corners=False, antialias=False)
    with torch.no_grad():
        expected = (largest(bigger) + alone(bigger)) / 2
        torch.testing.assert_close(both(x), expected, atol=0.05, rtol=0.05)
    assert size == (1, 28, 28)
    assert stage.run(candidate, context).network is not None


def test_a_searched_network_teaches_with_its_weights(context, task, tmp_path):
    space = load_space("tiny_images", 1, 10)
    row = space.references["smallest"]
    source, file = "tiny_images:" + ".".join(map(str, row.tolist())), tmp_path / "searched.safetensors"
    torch.manual_seed(3)
    network = space.build(row)
    save_weights(file, network)
    teacher, shape = make_teacher([source], [str(file)], {}, context)
    x = fit_size(task.prepare(task.split("val").images[:3]), shape)
    torch.testing.assert_close(teacher(x), network.eval()(x))
    with pytest.raises(UserError, match="teacher 'tiny_images:smallest' has random weights: give teacher_weights"):
        make_teacher(["tiny_images:smallest"], [], {}, context)


class Blind(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] * 0 + torch.nan


def blind(input_shape, num_classes):
    return Blind()


def no_module(input_shape, num_classes):
    return 3


def test_teachers_that_cannot_teach_are_named(candidate, context, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    alone = StageContext(context.task, context.space, context.directory, 0, None, context.input_shape)
    cases = [
        (Distill(), alone, "teacher = 'supernet': this run has none"),
        (Distill(teacher="resnet18"), context, "has random weights: give teacher_weights"),
        (Distill(teacher="resnet81", teacher_epochs=1), context, "resnet18"),
        (Distill(teacher="resnet18@big", teacher_epochs=1), context, "NAME@RESOLUTION"),
        (Distill(teacher="resnet18", teacher_weights=str(tmp_path / "no")), context, "no such checkpoint"),
        (Distill(teacher="mine:blind"), context, "outputs are not finite"),
        (Distill(teacher="mine:no_module"), context, "returned a int"),
        (Distill(feature_weight=1.0, layers=[("stem", "nowhere")]), context, "no layer 'nowhere'"),
        (Distill(feature_weight=1.0, layers=[("head", "stem")]), context, "layer 'head' gives no feature map"),
    ]
    for stage, where, match in cases:
        with pytest.raises(UserError, match=match):
            stage.run(candidate, where)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"logits_weight": 0.0}, "nothing is distilled"),
        ({"logits_weight": 2.0}, "distillation_weight = 2.0"),
        ({"feature_weight": -1.0}, "feature_weight = -1.0"),
        ({"attention_weight": float("nan")}, "attention_weight = nan"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"teacher": []}, "at least one"),
        ({"teacher": ["a", "b"], "teacher_weights": "x"}, "1 files for 2 teachers"),
        ({"teacher": ["a", "b"], "feature_weight": 1.0}, "an ensemble teaches by its logits alone"),
        ({"teacher_epochs": -1}, "epochs = -1"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(UserError, match=match):
        Distill(**options)


def test_a_loss_that_breaks_down_keeps_the_last_good_state(candidate, context):
    with pytest.raises(UserError, match="training broke down"):
        Distill(epochs=3, lr=1e30, batch_size=40, feature_weight=1.0).run(candidate, context)
    assert all(bool(torch.isfinite(p).all()) for p in candidate.network.parameters())
