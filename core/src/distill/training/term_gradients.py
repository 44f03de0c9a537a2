"""What each term of a criterion pulls the student with: measured beside training, for its log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from distill import distributed
from distill.config.experiment import Stage
from distill.data.batch import map_tensors
from distill.data.plan import Plan
from distill.model.distiller import Distiller
from distill.model.wiring import Values, value_name
from distill.observer import TermGradients
from distill.reference import STUDENT

LEAST, MOST = 0.001, 0.99
"""Shares of the gradient beyond which a term is told of: 0.1 % and 99 %."""
PASSED_THROUGH = ("CloneBackward0", "ToCopyBackward0")
"""Steps of a graph behind which lies the same value: copied, or in another precision."""

Edges = Sequence[GradientEdge]


@dataclass(frozen=True)
class _Place:
    """Values at which gradients are taken.

    Attributes:
        names: of the values.
        is_origin: whether as the student gave them, before they were copied or widened for losses.
        reached: for each term, whether it depends on them.
    """

    names: tuple[str, ...]
    is_origin: bool
    reached: tuple[bool, ...]


class TermProbe:
    """Measures the gradient of each weighted term with respect to what the student gives.

    That is the student's output where every term depends on it. Where one reads a feature before
    it, gradients are taken with respect to the last of the student's values that are asked for on
    which every term depends, on the way through the rest of the student too: so all are vectors of
    one space, and their norms and cosines compare. If there is none, as with features of parallel
    branches, they are taken with respect to all those values together. A term that depends on none
    of them, such as one of a peer or on a module's own parameters, has no norm.

    The numbers are those of the batch over all processes, and of one process with the whole batch.
    They are free of fp16's loss scale. Where one is not finite nothing is told: the step that
    follows tells what overflowed. Training is the same to the bit with it and without.

    Args:
        distiller: not wrapped.
        device: of this process.
        stage: its name, for warnings.
    """

    def __init__(self, distiller: Distiller, device: torch.device, stage: str):
        self._criterion = distiller.criterion
        self._device, self._stage = device, stage
        self._terms = tuple(call.name for call in distiller.criterion.calls)
        capture = distiller.captures.get(STUDENT)
        paths = capture.paths if capture is not None else ()
        self._names = (STUDENT, *(value_name(STUDENT, path) for path in paths))
        self._place: _Place | None = None
        self._told: set[str] = set()
        self._seen: tuple[Values, dict[str, torch.Tensor]] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep values and losses of a forward of the distiller until they are measured."""

        def keep(_: Any, arguments: tuple[Any, ...], losses: dict[str, torch.Tensor]) -> None:
            self._seen = arguments[0], dict(losses)

        handle: RemovableHandle = self._criterion.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def measure(self, share: float, scale: float = 1.0) -> TermGradients | None:
        """Return what the recorded batch shows, before its backward; all processes must ask.

        Args:
            share: the batch's, see ``Batch``.
            scale: to multiply losses with on the way, against underflow in fp16.

        Returns:
            The measurement, the same on all processes; ``None`` if some number is not finite.
        """
        assert self._seen is not None, "nothing is recorded"
        (values, losses), self._seen = self._seen, None
        terms = [losses[name] for name in self._terms]
        weights = {name: float(self._criterion.weights[name]) for name in self._terms}
        if self._place is None:
            # Agreed upon, since a backward may exchange numbers between processes.
            self._place = distributed.from_main(_choose(self._candidates(values), terms))
        place = self._place
        edges = self._edges(values, place)
        gradients = [
            _gradient(losses[name], share * weights[name] * scale, edges if reached else [])
            for name, reached in zip(self._terms, place.reached, strict=True)
        ]
        products = _products(gradients, len(edges)) / scale**2
        plain = torch.stack([term.detach() for term in terms]).double().cpu() * share
        if not share:  # a sample that stands in, which may give anything
            products, plain = torch.zeros_like(products), torch.zeros_like(plain)
        own = torch.cat([torch.tensor([share], dtype=torch.float64), plain, products.flatten()])
        whole = distributed.sum_over_ranks(own, self._device).cpu()
        if not whole.isfinite().all():
            return None
        count = len(terms)
        products = whole[1 + count :].view(count, count) / whole[0] ** 2
        means = (whole[1 : 1 + count] / whole[0]).tolist()
        return self._told_of(place, dict(zip(self._terms, means, strict=True)), weights, products)

    def _told_of(
        self, place: _Place, values: dict[str, float], weights: dict[str, float], products: Any
    ) -> TermGradients:
        rows = {n: i for i, n in enumerate(self._terms) if place.reached[i]}
        norms = {name: math.sqrt(max(float(products[i, i]), 0.0)) for name, i in rows.items()}
        total = sum(norms.values())
        shares = {name: norm / total for name, norm in norms.items()} if total else {}
        cosines = {
            f"{a}.{b}": min(1.0, max(-1.0, float(products[i, j]) / (norms[a] * norms[b])))
            for a, i in rows.items()
            for b, j in rows.items()
            if i < j and norms[a] and norms[b]
        }
        warnings = self._warnings(place.names, shares, weights)
        return TermGradients(place.names, values, weights, norms, shares, cosines, warnings)

    def _warnings(
        self, at: Sequence[str], shares: Mapping[str, float], weights: Mapping[str, float]
    ) -> tuple[str, ...]:
        """Tell of terms that carry nearly nothing or nearly everything, each one once."""
        weighed = {name: share for name, share in shares.items() if weights[name]}
        found = []
        for name, share in weighed.items() if len(weighed) > 1 else ():
            if LEAST <= share <= MOST or name in self._told:
                continue
            self._told.add(name)
            is_least = share < LEAST
            percent = f"{100 * share:.{2 if is_least else 4}g} %"
            found.append(
                f"stage '{self._stage}': the term '{name}' carries {percent} of the gradient at "
                f"{', '.join(at)}, so {'it trains' if is_least else 'the other terms train'} next "
                f"to nothing; {'raise' if is_least else 'lower'} its weight, {weights[name]:g}"
            )
        return tuple(found)

    def _candidates(self, values: Values) -> list[tuple[tuple[str, ...], bool, Edges]]:
        """Return the student's values as places to measure at, the best one first."""
        found = {name: _edges(values[name]) for name in self._names if name in values}
        found = {name: edges for name, edges in found.items() if edges}
        origins = {name: [_origin(edge) for edge in edges] for name, edges in found.items()}
        order = sorted(found, key=lambda name: -max(_number(edge) for edge in origins[name]))
        both = [(name,) for name in order]
        together = [edge for edges in found.values() for edge in edges]
        return [
            *((name, False, found[name[0]]) for name in both),
            *((name, True, origins[name[0]]) for name in both),
            (tuple(found), False, together),
        ]

    @staticmethod
    def _edges(values: Values, place: _Place) -> Edges:
        edges = [edge for name in place.names for edge in _edges(values[name])]
        return [_origin(edge) for edge in edges] if place.is_origin else edges


def _choose(
    candidates: Sequence[tuple[tuple[str, ...], bool, Edges]], terms: Sequence[torch.Tensor]
) -> _Place:
    """Return the first place on which every term depends that depends on any."""
    behind = [_behind(term) for term in terms]
    everywhere = [edge for *_, edges in candidates for edge in edges]
    able = [any(_key(edge) in graph for edge in everywhere) for graph in behind]
    for names, is_origin, edges in candidates:
        reached = tuple(any(_key(edge) in graph for edge in edges) for graph in behind)
        if all(does for does, can in zip(reached, able, strict=True) if can):
            return _Place(names, is_origin, reached)
    names, is_origin, edges = candidates[-1]
    reached = tuple(any(_key(edge) in graph for edge in edges) for graph in behind)
    return _Place(names, is_origin, reached)


def _behind(term: torch.Tensor) -> set[tuple[Node, int]]:
    """Return the steps of the graph that a term depends on, and which of their outputs."""
    found: set[tuple[Node, int]] = set()
    waiting = [_key(get_gradient_edge(term))] if term.requires_grad else []
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        waiting += [(node, number) for node, number in one[0].next_functions if node is not None]
    return found


def _key(edge: GradientEdge) -> tuple[Node, int]:
    return edge.node, edge.output_nr


def _number(edge: GradientEdge) -> int:
    """Return a number that is greater the later in the forward a value was computed."""
    return int(edge.node._sequence_nr())


def _edges(value: Any) -> list[GradientEdge]:
    """Return the places in the graph of a value's tensors that were computed from parameters."""
    found: list[GradientEdge] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad and not tensor.is_leaf:
            found.append(get_gradient_edge(tensor))
        return tensor

    map_tensors(note, value)
    return found


def _origin(edge: GradientEdge) -> GradientEdge:
    """Return the place in the graph of what a value is a copy of."""
    while edge.node.name() in PASSED_THROUGH:
        node, number = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, number)
    return edge


def _gradient(term: torch.Tensor, factor: float, edges: Edges) -> tuple[torch.Tensor | None, ...]:
    """Return the gradient of ``factor`` times a term, ``None`` where it does not depend."""
    if not edges:
        return ()
    given = torch.full_like(term, factor)
    return torch.autograd.grad(term, edges, given, retain_graph=True, allow_unused=True)


def _products(gradients: Sequence[Sequence[torch.Tensor | None]], places: int) -> torch.Tensor:
    """Return the inner product of each two terms' gradients, (terms, terms) in float64."""
    found = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for number in range(places):
        rows = [_scaled(g[number] if g else None) for g in gradients]
        for i, (one, size) in enumerate(rows):
            for j, (other, other_size) in enumerate(rows[: i + 1]):
                if one is not None and other is not None:
                    product = (one * other).sum().item() * size * other_size
                    found[i, j] += product
                    if i != j:
                        found[j, i] += product
    return found


def _scaled(gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    """Return a gradient over its largest element, whose square might underflow, and that one."""
    if gradient is None:
        return None, 0.0
    if gradient.dtype in (torch.bfloat16, torch.float16):
        gradient = gradient.float()
    largest = gradient.abs().max().item() if gradient.numel() else 0.0
    return (gradient / largest if largest else gradient), largest


def unmeasured(stage: Stage, plan: Plan, log_every: int) -> list[str]:
    """Return a line to tell where no log line comes before an epoch is over."""
    if not stage.term_gradients or plan.steps >= log_every:
        return []
    return [
        f"term_gradients measures nothing: an epoch has {plan.steps:,} steps, and log_every is "
        f"{log_every:,}; lower it"
    ]
