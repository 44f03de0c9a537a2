"""A model without the branches that lead to nothing asked of it, where its code can be traced."""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from distill.model.capture import find_module
from distill.model.wiring import first_line


class Untraceable(Exception):
    """A model's forward cannot be followed; the text says why."""


@dataclass(frozen=True)
class Pruned:
    """A model without side branches, sharing its modules.

    Attributes:
        module: to call in the model's place.
        left_out: the side branches, by the module that stands directly in the model.
    """

    module: fx.GraphModule
    left_out: tuple[str, ...]


def without_side_branches(
    model: nn.Module, tapped: Iterable[str], parts: Sequence[str]
) -> Pruned | None:
    """Return the model less what leads to nothing asked of it, with the very same modules.

    Only what comes before the last value asked for counts: behind it the forward is stopped anyway.
    A module is looked into only if something inside of it is asked for.

    Args:
        model: in the mode in which it will run; called with one argument.
        tapped: paths of modules that are captured.
        parts: keys or positions of the output that are asked for.

    Returns:
        What is left of it; ``None`` if there are no such branches.

    Raises:
        Untraceable: if the forward cannot be followed.
    """
    modules = {find_module(model, path) for path in tapped} - {model}
    graph = _trace(model, modules)
    *nodes, output = graph.nodes
    taps = [n for n in nodes if n.op == "call_module" and modules & set(_parts(model, n))]
    output.args = (_asked(output.args[0], parts),)
    live = _ancestors([*taps, output, *filter(_has_effect, nodes)])
    dead = [node for node in nodes if node not in live and node.op != "placeholder"]
    end = nodes.index(taps[-1]) if taps and not parts else len(nodes)
    kept = set(_children_called(live))
    branches = _children_called(node for node in dead if nodes.index(node) < end)
    left_out = tuple(dict.fromkeys(name for name in branches if name not in kept))
    if not branches:
        return None
    for node in reversed(dead):
        graph.erase_node(node)
    try:
        return Pruned(fx.GraphModule(model, graph), left_out)
    except Exception as error:  # names of the model's own that torch.fx keeps for itself
        raise Untraceable(first_line(error)) from error


def _children_called(nodes: Iterable[fx.Node]) -> list[str]:
    """Return the names of modules that stand directly in the model and are called by nodes."""
    return [str(node.target).partition(".")[0] for node in nodes if node.op == "call_module"]


def _trace(model: nn.Module, tapped: set[nn.Module]) -> fx.Graph:
    """Follow the forward with placeholders, through the modules that hold a tapped one."""
    # A tapped module stays a module, whose hook records it; so does what lies inside of it.
    closed = {inner for module in tapped for inner in module.modules()}
    opened = {m for m in model.modules() if tapped & (set(m.modules()) - {m})} - closed | {model}
    shells: set[nn.Module] = set()
    shell = _shell(model, opened, shells)
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    before = _random_states()
    try:
        graph = _Tracer(shells).trace(shell, concrete_args=defaults or None)
    except Exception as error:  # the model is foreign code
        raise Untraceable(first_line(error)) from error
    if _random_states() != before:
        # What was drawn would stand in the trace once and for all.
        raise Untraceable("it draws random numbers in its forward")
    return graph


class _Tracer(fx.Tracer):
    def __init__(self, opened: set[nn.Module]):
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened


def _shell(module: nn.Module, opened: set[nn.Module], shells: set[nn.Module]) -> nn.Module:
    """Return a copy of a module, sharing all modules but the opened ones.

    What a forward keeps in its attributes while it is traced goes to the copy.
    """
    shell = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        setattr(shell, name, dict(getattr(module, name)))
    shell._modules = {
        name: _shell(child, opened, shells) if child in opened else child
        for name, child in module._modules.items()
    }
    shells.add(shell)
    return shell


def _random_states() -> list[bytes]:
    states = [repr(random.getstate()).encode(), repr(np.random.get_state()).encode()]
    states.append(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_initialized():
        # Of the GPU in use: to ask those of other processes wakes them up.
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def _parts(model: nn.Module, node: fx.Node) -> Iterable[nn.Module]:
    return model.get_submodule(str(node.target)).modules()


def _asked(output: Any, parts: Sequence[str]) -> Any:
    """Return what of an output is asked for, nothing in the place of the rest."""
    if not parts:
        return None
    if isinstance(output, dict):
        return {key: value for key, value in output.items() if str(key) in parts}
    if isinstance(output, fx.Node) and _makes_named_tuple(output):
        output.args = tuple(v if str(n) in parts else None for n, v in enumerate(output.args))
    if isinstance(output, (list, tuple)):
        return [value if str(n) in parts else None for n, value in enumerate(output)]
    return output


def _makes_named_tuple(node: fx.Node) -> bool:
    return isinstance(node.target, type) and issubclass(node.target, tuple) and not node.kwargs


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does more than to give a value: an assertion, or a change in place."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and node.target in (operator.setitem, torch._assert)
