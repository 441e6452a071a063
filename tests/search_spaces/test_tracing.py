"""Workloads of arbitrary modules."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import UserError, Workload, read_onnx, trace


def kinds(module: nn.Module, *shape: int, **options: torch.dtype) -> list[str]:
    return [op.kind for op in trace(module, shape, **options).operators]


class Zoo(nn.Module):
    """Convolutions of all kinds, activations in place, pools, resizing, concatenation of views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, (3, 5), padding=(1, 2), groups=8, bias=False)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.relu6(F.max_pool2d(self.depthwise(x), 2))
        x = F.silu(F.avg_pool2d(self.grouped(x), 2, 1))
        x = F.interpolate(self.up(x), scale_factor=2)
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a * F.hardsigmoid(b), x, b + 1], dim=1)
        return self.classifier(x.mean((2, 3)).flatten(1))


def test_operators_of_a_convolutional_network() -> None:
    zoo = Zoo()
    workload = trace(zoo, (3, 16, 16))
    assert [op.kind for op in workload.operators] == [
        "conv2d", "batch_norm", "relu", "depthwise_conv2d", "max_pool2d", "relu6", "conv2d", "avg_pool2d", "silu",
        "conv_transpose2d", "resize", "hard_sigmoid", "mul", "add", "concat", "global_avg_pool", "linear",
    ]  # fmt: skip
    macs = {op.kind: op.macs for op in workload.operators if op.macs}
    conv, depthwise, grouped, up, linear = (op for op in workload.operators if op.macs)
    assert conv.macs == 8 * 8 * 8 * 3 * 9
    assert (conv.kernel, conv.stride, conv.groups) == ((3, 3), (2, 2), 1)
    assert depthwise.macs == 16 * 8 * 8 * 15
    assert (depthwise.kernel, depthwise.groups) == ((3, 5), 8)
    assert grouped.macs == 16 * 4 * 4 * 4
    assert up.macs == 16 * 3 * 3 * 4 * 4
    assert linear.macs == 40
    assert workload.macs == sum(op.macs for op in workload.operators) > max(macs.values())
    assert workload.params == sum(p.numel() for p in zoo.parameters())
    assert workload.tensors[workload.inputs[0]].shape == (3, 16, 16)
    assert workload.tensors[workload.outputs[0]].shape == (5,)


@pytest.mark.parametrize(("mode", "edge"), [("nearest", 1), ("bilinear", 2), ("bicubic", 4)])
def test_resizing_says_what_window_each_value_is_computed_of(mode: str, edge: int) -> None:
    (op,) = trace(nn.Upsample(scale_factor=2, mode=mode), (3, 8, 8)).operators
    assert (op.kind, op.kernel) == ("resize", (edge, edge))


def test_views_alias_the_tensor_that_they_come_from() -> None:
    workload = trace(Zoo(), (3, 16, 16))
    gate = next(i for i, op in enumerate(workload.operators) if op.kind == "hard_sigmoid")
    mul = next(i for i, op in enumerate(workload.operators) if op.kind == "mul")
    resized = next(w for op, w in zip(workload.operators, workload.writes, strict=True) if op.kind == "resize")
    assert workload.reads[gate] == (resized,)
    assert workload.reads[mul] == (resized, workload.writes[gate])
    assert workload.operators[mul].inputs[0].shape == (2, *workload.tensors[resized].shape[1:])


def test_attention_is_seen_as_its_products() -> None:
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    workload = trace(encoder, (10, 16))
    found = [op for op in workload.operators if op.macs]
    assert [op.kind for op in found] == ["linear", "matmul", "matmul", "linear", "linear", "linear"]
    projections, attention = 10 * 16 * (3 * 16 + 16 + 2 * 32), 2 * 4 * 10 * 10 * 4
    assert workload.macs == projections + attention
    assert workload.params == sum(p.numel() for p in encoder.parameters())
    assert {"softmax", "layer_norm", "add"} <= {op.kind for op in workload.operators}


def test_shared_and_derived_parameters_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.linear(self.linear(x)), F.normalize(self.linear.weight))

    workload = trace(Shared(), (6,))
    assert [op.kind for op in workload.operators] == ["linear"] * 3
    assert [op.params for op in workload.operators] == [42, 0, 0]


def test_tokens_can_be_traced() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 50))
    workload = trace(model, (12,), dtype=torch.long)
    assert [op.kind for op in workload.operators] == ["embedding", "layer_norm", "linear"]
    assert workload.tensors[workload.inputs[0]].itemsize == 8
    assert workload.tensors[workload.outputs[0]].itemsize == 4
    assert workload.params == sum(p.numel() for p in model.parameters())


def test_unknown_operators_keep_their_name_and_count_nothing() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)

    (op,) = trace(Odd(), (7,)).operators
    assert (op.kind, op.macs, op.params) == ("cumsum", 0, 0)


def test_tracing_leaves_no_trace() -> None:
    zoo = Zoo().train()
    zoo.norm.eval()
    state = {k: v.clone() for k, v in zoo.state_dict().items()}
    random_state = torch.get_rng_state()
    trace(zoo, (3, 16, 16))
    assert all(torch.equal(v, state[k]) for k, v in zoo.state_dict().items())
    assert zoo.training
    assert zoo.conv.training
    assert not zoo.norm.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert zoo(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_wrong_inputs_are_explained() -> None:
    zoo = Zoo()
    with pytest.raises(UserError, match=r"cannot trace Zoo with input \(4, 16, 16\).*expected.*3 channels"):
        trace(zoo, (4, 16, 16))
    assert zoo.training

    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="cannot trace Fickle"):
        trace(Fickle(), (3,))


def test_padded_pooling_as_large_as_the_map_is_not_global() -> None:
    padded, whole = (trace(nn.AvgPool2d(3, 1, padding), (4, 3, 3)).operators[0] for padding in (1, 0))
    assert (padded.kind, padded.output.shape) == ("avg_pool2d", (4, 3, 3))
    assert (whole.kind, whole.output.shape) == ("global_avg_pool", (4, 1, 1))


class Shuffled(nn.Module):
    """A tensor split, one half reordered, both read twice."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        first, second = x.chunk(2, 1)
        shuffled = second.reshape(n, 2, c // 4, h, w).transpose(1, 2).reshape(n, c // 2, h, w)
        return torch.cat([first.relu(), shuffled.relu(), shuffled.sigmoid()], 1)


def moves(workload: Workload) -> list[list[tuple[str, int]]]:
    """Kinds and sizes, of each operator that has any."""
    return [[(move.kind, move.output.size) for move in op.moved] for op in workload.operators if op.moved]


def test_slices_and_transpositions_are_named_once_by_their_first_reader() -> None:
    workload = trace(Shuffled(), (8, 6, 6))
    assert moves(workload) == [[("slice", 144)], [("slice", 144), ("transpose", 144)]]
    assert [op.kind for op in workload.operators] == ["relu", "relu", "sigmoid", "concat"]
    assert [move.output.itemsize for op in workload.at(1).operators for move in op.moved] == [1, 1, 1]


def test_views_that_leave_values_in_place_move_nothing() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1)[:, :, :6].flatten(1).unsqueeze(2)  # whole, and dimensions of size 1
            return y.permute(0, 2, 1).relu()

    assert moves(trace(Views(), (8, 6, 6))) == []


def test_a_result_that_is_a_view_is_moved_by_its_writer() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu().transpose(2, 3), x[:, :4]  # and a view of the input, which nothing in here writes

    assert moves(trace(Last(), (8, 6, 5))) == [[("transpose", 240)]]


def test_an_onnx_file_has_the_moves_of_its_network(tmp_path: Path) -> None:
    torch.onnx.export(Shuffled(), (torch.zeros(1, 8, 6, 6),), tmp_path / "s.onnx", dynamo=False)
    assert read_onnx(tmp_path / "s.onnx") == trace(Shuffled(), (8, 6, 6))
