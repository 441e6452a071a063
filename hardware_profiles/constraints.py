"""What a device cannot run of a network, and why: its profile's constraints held against operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hardware_profiles.profile import Target
from hardware_profiles.profile_sections import Constraints
from search_spaces.operators import FOLDED, Operator, Tensor, Workload


@dataclass(frozen=True)
class Finding:
    """One operator of a network that a target does not run.

    Args:
        operator: with its shapes.
        index: its place in the workload.
        reason: why, in words.
        source: who says so.
        otherwise: what becomes of it: the network is `refused`, or the operator is left to the `host_cpu`.
    """

    operator: Operator
    index: int
    reason: str
    source: str
    otherwise: str

    def __str__(self) -> str:
        then = "the network is refused" if self.otherwise == "refused" else "it is left to the host's CPU"
        return f"operator {self.index}, {self.operator.kind}: {self.reason}; {then} ({self.source})"


def unsupported(op: Operator, rules: Constraints) -> tuple[str, str] | None:
    """Why an operator does not run under these constraints, and who says so; None where it does.

    Normalisation is folded into the operator before it everywhere, so it is never asked for.
    """
    if op.kind in FOLDED:
        return None
    if op.kind in rules.unsupported_operators:
        return f"{op.kind} is not supported", rules.source
    if rules.operators and op.kind not in rules.operators:
        return f"{op.kind} is not among the supported operators", rules.source
    ranks = [len(t.shape) for t in _tensors(op)]
    if rules.max_rank is not None and max(ranks) > rules.max_rank:
        return f"a tensor has {max(ranks)} dimensions besides the batch, above {rules.max_rank}", rules.source
    limit = rules.limits.get(op.kind)
    if limit is not None and (broken := limit.broken(op)):
        return broken, limit.source
    return None


def check_workload(workload: Workload, target: Target) -> list[Finding]:
    """The operators of a network that a target does not run, in execution order; empty where it runs them all.

    What the list cannot tell, for a workload does not hold it: padding, dilation, reshapes and the quantisation.

    >>> check_workload(load_space("mobilenet_v3_small").workload(arch), load_target("edge_tpu"))[0].operator.kind
    'hard_swish'
    """
    rules = target.constraints
    known: dict[Operator, tuple[str, str] | None] = {}
    findings = []
    for index, op in enumerate(workload.operators):
        if op not in known:
            known[op] = unsupported(op, rules)
        if (why := known[op]) is not None:
            findings.append(Finding(op, index, *why, rules.otherwise))
    return findings


def _tensors(op: Operator) -> Iterator[Tensor]:
    yield from op.inputs
    yield op.output
