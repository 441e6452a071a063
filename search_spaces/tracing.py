"""The workload of any torch module, from one pass over tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_spaces.errors import UserError
from search_spaces.movement import Moves, reorders
from search_spaces.operators import Operator, Shape, Workload, WorkloadBuilder
from search_spaces.operators import Tensor as TensorSpec

# aten name (without a trailing underscore) -> operator kind. Others keep their aten name.
_KINDS = {
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "_prelu_kernel": "prelu",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "cat": "concat",
    "max_pool2d_with_indices": "max_pool2d",
    "_adaptive_avg_pool2d": "avg_pool2d",
}
# Resizing, and the edge of the window that each value is computed of.
_RESIZES = {"upsample_nearest2d": 1, "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 4}
# Copies and casts that change neither values nor their number: seen as the tensor they come from, like views.
_ALIASES = frozenset({"clone", "contiguous", "detach", "_to_copy", "_unsafe_view", "lift_fresh", "copy"})
# In place, these change a tensor's view of its data, and torch does not count them among the views.
_ALIASES |= {"as_strided", "squeeze", "unsqueeze", "transpose", "t"}

# What changes the order of dimensions -> the dimensions in their new order.
_ORDERS: dict[str, Callable[..., Sequence[int]]] = {
    "permute": lambda x, order: order,
    "transpose": lambda x, a, b: _swapped(x.dim(), a, b),
    "t": lambda x: range(x.dim())[::-1],
}


def trace(module: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Workload:
    """The operators that `module` runs in inference on one sample of `input_shape`.

    Shapes alone are computed: no weight is copied, the module and torch's random state stay as they are, and a module
    on the meta device needs no weights at all. Views, reshapes, casts and copies are no operators (slices and
    transpositions are in `Operator.moved`); an operator that is not known keeps its aten name and counts zero
    multiply-accumulates. Attention is seen as its products and softmax.

    Args:
        input_shape: per sample, without the batch dimension.
        dtype: of the input; `torch.long` for tokens.

    Raises:
        UserError: the module does not run on that shape, or its path depends on the data.
    """
    return _trace(module, input_shape, dtype, _Recorder(module))


def trace_layers(
    module: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> tuple[Workload, tuple[str, ...]]:
    """As `trace`, and for every operator the submodule that runs it, by its dotted name; "" for the module itself.

    Raises:
        UserError: as `trace`.
    """
    recorder, owners, running = _Recorder(module), list[str](), [""]

    def catch_up() -> None:
        owners.extend([running[-1]] * (recorder.count - len(owners)))

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            catch_up()
            running.append(name)

        return hook

    def leave(*_: Any) -> None:
        catch_up()
        running.pop()

    handles = []
    for name, submodule in module.named_modules():
        handles += [submodule.register_forward_pre_hook(enter(name)), submodule.register_forward_hook(leave)]
    try:
        workload = _trace(module, input_shape, dtype, recorder)
    finally:
        for handle in handles:
            handle.remove()
    catch_up()
    return workload, tuple(owners)


def _trace(module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, recorder: _Recorder) -> Workload:
    try:
        with _inference(module), sdpa_kernel(SDPBackend.MATH), _without_data(module):
            sample = torch.empty((1, *input_shape), dtype=dtype)
            recorder.source(sample)
            with recorder:
                result = module(sample)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot trace {type(module).__name__} with input {tuple(input_shape)} (no batch): {first_line}"
        ) from error
    return recorder.workload(result)


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """The module in eval mode without gradients, and as it was afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        # One fused encoder operator would hide what is in it.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for m, training in modes:
            m.training = training


def _without_data(module: nn.Module) -> AbstractContextManager[Any]:
    """Where tensors have shapes only: the meta device if the module is there, else fake tensors beside its weights."""
    if any(p.is_meta for p in module.parameters()):
        return torch.device("meta")
    return FakeTensorMode(allow_non_fake_inputs=True)


def _per_sample(tensor: Tensor) -> Shape:
    """Shape without the batch dimension: batch is 1, so a leading 1 is it, or tells nothing."""
    shape = tuple(int(s) for s in tensor.shape)
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(_per_sample(tensor), tensor.element_size())


class _Recorder(TorchDispatchMode):
    """Writes down every aten operator that reads an activation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._builder = WorkloadBuilder()
        self._index: dict[int, int] = {}  # id of a tensor -> index of the activation that it is, or is a view of
        self._moves = Moves()  # by id of a tensor
        self._from_params: dict[int, frozenset[int]] = {}  # id of a tensor -> parameters that it is computed from
        self._sizes: dict[int, int] = {}  # parameters that no operator has been charged with yet
        self._alive: list[Tensor] = []  # keeps ids from being used twice
        for parameter in module.parameters():
            self._from_params[id(parameter)] = frozenset({id(parameter)})
            self._sizes[id(parameter)] = parameter.numel()

    def source(self, tensor: Tensor) -> None:
        """Declare the graph's input."""
        self._alive.append(tensor)
        self._index[id(tensor)] = self._builder.input(_spec(tensor))

    @property
    def count(self) -> int:
        """Operators so far."""
        return len(self._builder.operators)

    def index_of(self, value: Any) -> int | None:
        """Which activation a value is, or is a view of; None for what is none."""
        return self._index.get(id(value))

    def workload(self, result: Any) -> Workload:
        """What was recorded, with the activations in `result` as outputs."""
        leaves = [leaf for leaf in tree_leaves(result) if id(leaf) in self._index]
        for leaf in leaves:
            self._builder.move(self._index[id(leaf)], self._moves.name([id(leaf)]))
        return self._builder.build(list(dict.fromkeys(self._index[id(leaf)] for leaf in leaves)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Before the call: an operator in place returns the very tensor that it read.
        reads = [t for t in given if id(t) in self._index]
        seen = [(self._index[id(t)], _spec(t)) for t in reads]
        params = frozenset().union(*(self._from_params.get(id(t), frozenset()) for t in given))
        out = _SHAPES[func](*args) if func in _SHAPES else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._alive += made
        if not made:
            return out
        name = func._schema.name.partition("::")[2].removesuffix("_")  # in place or not
        if not seen:  # computed from weights and constants alone, so once and not per sample
            self._from_params.update((id(t), params) for t in made)
            return out
        if func.is_view or name in _ALIASES:
            written = seen[0][0]
            transposed = name in _ORDERS and reorders(reads[0].shape, _ORDERS[name](*args))
            for view in made:
                self._moves.view(id(reads[0]), id(view), seen[0][1], _spec(view), transposed)
        else:
            moved = self._moves.name([id(t) for t in reads])
            written = self._record(name, args, seen, made[0], sum(self._sizes.pop(p, 0) for p in params), moved)
        self._index.update((id(t), written) for t in made)
        return out

    def _record(
        self, name: str, args: Any, seen: list[tuple[int, TensorSpec]], out: Tensor, params: int,
        moved: tuple[Operator, ...],
    ) -> int:  # fmt: skip
        kind, attributes = _READERS.get(name, _plain)(name, args, self._index)
        if name in ("addmm", "baddbmm") and id(args[0]) in self._index:
            seen = [*seen[1:], seen[0]]  # the factors first: the last dimension of the first is what is summed over
        return self._builder.add(
            kind,
            [index for index, _ in seen],
            _per_sample(out),
            params=params,
            inputs=[spec for _, spec in seen],
            itemsize=out.element_size(),
            moved=moved,
            **attributes,
        )


# torch's own ways to the shapes of these results take most of the time of a trace.


def _normalised(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result of batch normalisation in inference."""
    return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)


def _layer_normalised(x: Tensor, shape: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        return torch.ops.aten.native_layer_norm(x, shape, *rest)  # says what is wrong
    return _normalised(x)


def _alike(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _affine(shift: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[1] != weight.shape[0]:
        return torch.ops.aten.addmm(shift, x, weight)  # says what is wrong
    return x.new_empty((x.shape[0], weight.shape[1]))


_SHAPES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _normalised,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _normalised,
    torch.ops.aten.native_layer_norm.default: _layer_normalised,
    torch.ops.aten._softmax.default: _alike,
    torch.ops.aten._safe_softmax.default: _alike,
    torch.ops.aten.silu.default: _alike,
    torch.ops.aten.gelu.default: _alike,
    torch.ops.aten.addmm.default: _affine,
}

_Read = tuple[str, dict[str, Any]]
_Activations = dict[int, int]


def _plain(name: str, args: Any, activations: _Activations) -> _Read:
    return _KINDS.get(name, name), {}


def _convolution(name: str, args: Any, activations: _Activations) -> _Read:
    x, weight, _, stride, _, _, transposed, _, groups = args[:9]
    depthwise = groups > 1 and groups == x.shape[1]
    kind = "conv_transpose2d" if transposed else "depthwise_conv2d" if depthwise else "conv2d"
    kernel = tuple(weight.shape[2:])
    return kind, {"kernel": kernel, "stride": _fill(stride, len(kernel)), "groups": groups}


def _product(name: str, args: Any, activations: _Activations) -> _Read:
    second = args[2] if name in ("addmm", "baddbmm") else args[1]
    return "matmul" if id(second) in activations else "linear", {}


def _pool(name: str, args: Any, activations: _Activations) -> _Read:
    kernel = _fill(args[1], 2)
    stride = _fill(args[2], 2) if len(args) > 2 and args[2] else kernel
    padded = len(args) > 3 and any(_fill(args[3], 2))
    if name == "avg_pool2d" and kernel == tuple(args[0].shape[2:]) and not padded:
        return "global_avg_pool", {}
    return _KINDS.get(name, name), {"kernel": kernel, "stride": stride}


def _resize(name: str, args: Any, activations: _Activations) -> _Read:
    return "resize", {"kernel": 2 * (_RESIZES[name],)}


def _adaptive_pool(name: str, args: Any, activations: _Activations) -> _Read:
    size = tuple(args[0].shape[2:])
    stride = tuple(s // o for s, o in zip(size, _fill(args[1], len(size)), strict=True))
    return "avg_pool2d", {"kernel": stride, "stride": stride}


def _mean(name: str, args: Any, activations: _Activations) -> _Read:
    rank = args[0].dim()
    dims = sorted(d % rank for d in args[1] or range(rank)) if len(args) > 1 else list(range(rank))
    return "global_avg_pool" if rank == 4 and dims == [2, 3] else "mean", {}


def _clamp(name: str, args: Any, activations: _Activations) -> _Read:
    return "relu6" if tuple(args[1:3]) == (0, 6) else name, {}


def _swapped(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _fill(values: Any, length: int) -> tuple[int, ...]:
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * length if len(values) == 1 else values


_READERS: dict[str, Callable[[str, Any, _Activations], _Read]] = {
    "convolution": _convolution,
    **dict.fromkeys(("addmm", "mm", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d"), _pool),
    "_adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    **dict.fromkeys(("hardtanh", "clamp"), _clamp),
    **dict.fromkeys(_RESIZES, _resize),
}
