"""Search spaces: knobs, operators, blocks, stand-alone networks, supernets and reference networks.

Knows no devices, no strategies and no training: everything here is about what networks there are, and what operators
they consist of. torch is imported only by the modules that hold networks, on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_spaces.autoformer import AutoFormerSpace
    from search_spaces.base import Archs, Block, Catalog, Knob, Published, SearchSpace
    from search_spaces.chain import ChainSpace
    from search_spaces.elastic import ElasticSpace, elastic_space
    from search_spaces.errors import UserError, nearest
    from search_spaces.layered import Layer, LayeredSpace
    from search_spaces.loading import load_space, presets
    from search_spaces.mnasnet import MnasNetSpace
    from search_spaces.mobile_hybrid import MobileHybridSpace
    from search_spaces.mobilenet_v3 import MobileNetV3Space
    from search_spaces.nasbench201 import NASBench201Space
    from search_spaces.onnx_reader import read_onnx
    from search_spaces.operators import Operator, Tensor, Workload, WorkloadBuilder
    from search_spaces.reference.base import ReferenceNetwork
    from search_spaces.reference.registry import reference_network, reference_networks
    from search_spaces.resnet import ResNetSpace
    from search_spaces.supernet import MixtureSupernet, NormStats, Supernet, calibrate
    from search_spaces.tracing import trace, trace_layers
    from search_spaces.weights import load_weights

_LAZY = {
    "Archs": "base",
    "AutoFormerSpace": "autoformer",
    "Block": "base",
    "Catalog": "base",
    "ChainSpace": "chain",
    "ElasticSpace": "elastic",
    "Knob": "base",
    "Layer": "layered",
    "LayeredSpace": "layered",
    "MixtureSupernet": "supernet",
    "MnasNetSpace": "mnasnet",
    "MobileHybridSpace": "mobile_hybrid",
    "MobileNetV3Space": "mobilenet_v3",
    "NASBench201Space": "nasbench201",
    "NormStats": "supernet",
    "Operator": "operators",
    "Published": "base",
    "ReferenceNetwork": "reference.base",
    "ResNetSpace": "resnet",
    "SearchSpace": "base",
    "Supernet": "supernet",
    "Tensor": "operators",
    "UserError": "errors",
    "Workload": "operators",
    "WorkloadBuilder": "operators",
    "calibrate": "supernet",
    "elastic_space": "elastic",
    "load_space": "loading",
    "load_weights": "weights",
    "nearest": "errors",
    "presets": "loading",
    "read_onnx": "onnx_reader",
    "reference_network": "reference.registry",
    "reference_networks": "reference.registry",
    "trace": "tracing",
    "trace_layers": "tracing",
}

__all__ = [
    "Archs", "AutoFormerSpace", "Block", "Catalog", "ChainSpace", "ElasticSpace", "Knob", "Layer", "LayeredSpace",
    "MixtureSupernet", "MnasNetSpace", "MobileHybridSpace", "MobileNetV3Space", "NASBench201Space", "NormStats",
    "Operator", "Published", "ReferenceNetwork", "ResNetSpace", "SearchSpace", "Supernet", "Tensor", "UserError",
    "Workload", "WorkloadBuilder", "calibrate", "elastic_space", "load_space", "load_weights", "nearest", "presets",
    "read_onnx", "reference_network", "reference_networks", "trace", "trace_layers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"search_spaces.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
