"""Head network distillation: a small bottlenecked head learns the first layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import zip_longest
from typing import Literal, get_args

from torch import Tensor, nn

from distill.parameters import check_choice
from distill_fitnet.fitnet import HintLoss
from distill_fitnet.size_rules import Step, measured, placement, step_of, steps_of

Reduction = Literal["sum", "mean"]


class HNDLoss(HintLoss):
    r"""Squared error of a head's feature, or of the features of several layers behind it.

    .. math::
        L = \sum_l w_l \, \| F_s^l - F_t^l \|^2

    One layer is head network distillation (HND); several, the later ones of the frozen tail, are
    the generalised form (GHND), whose gradients know what the tail does to an error.

    Args:
        reduction: ``"sum"`` over all elements, as published, or ``"mean"``. A sum grows with the
            batch, and the learning rate has to go with it.
        layer_weights: one number >= 0 for each layer; by default 1 for all, as published.

    Shape:
        - student_features, teacher_features: tensors of the same shape (B, ...), or as many of
          them in lists, one for each layer.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features, or weights, as layers; features
            of different shapes.

    Source: Matsubara et al., *Distilled Split Deep Neural Networks for Edge-Assisted Real-Time
    Systems*, HotEdgeVideo 2019, https://doi.org/10.1145/3349614.3356022 (HND); Matsubara,
    Levorato, *Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
    Challenged Networks*, ICPR 2020, https://arxiv.org/abs/2007.15818 (GHND).
    """

    def __init__(
        self, reduction: Reduction = "sum", layer_weights: list[float] | None = None
    ) -> None:
        check_choice(self, "reduction", reduction, get_args(Reduction))
        super().__init__(reduction, layer_weights)


class Bottleneck(nn.Module):
    """Convolutions that narrow down to a code and widen again; made by ``bottlenecked``.

    Attributes:
        encoder: convolutions with the whole stride, then a 3x3 one to the code, which is what
            would be sent from one machine to another.
        decoder: batch norm and ReLU on the code, then two 3x3 convolutions.
    """

    def __init__(
        self,
        planes: tuple[int, int, int],
        hidden: int,
        steps: Sequence[tuple[Step, Step]],
        relu: bool,
    ) -> None:
        """Build the layers: ``planes`` are the channels of input, code and output."""
        super().__init__()
        inputs, code, outputs = planes
        encoder: list[nn.Module] = []
        for high, wide in steps:
            kernel, stride, padding = zip(high, wide, strict=True)
            encoder += [
                nn.Conv2d(inputs, hidden, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
            ]
            inputs = hidden
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden, code, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(code),
            nn.ReLU(),
            nn.Conv2d(code, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.ReLU()] if relu else []),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return maps of the size and channels of what the replaced modules gave."""
        decoded: Tensor = self.decoder(self.encoder(features))
        return decoded


def bottlenecked(
    model: nn.Module,
    replace: list[str],
    channels: int,
    hidden: int = 64,
    in_channels: int | None = None,
    relu: bool = True,
) -> nn.Module:
    """Replace the first layers of a model by a small bottleneck, and return the model.

    The first of the replaced modules becomes a ``Bottleneck``, the others become ``nn.Identity``;
    all the rest keeps its weights. The bottleneck gives what the replaced modules gave in shape,
    for images of any height and width: they are run in a row on small images to learn how.

    For torchvision's ResNet: ``replace: [conv1, bn1, relu, maxpool, layer1, layer2]``.

    Args:
        model: in whose ``forward`` the replaced modules follow one another directly.
        replace: their names, in that order; ``block.0`` for a module inside another.
        channels: of the narrowest point, such as 12 or 3.
        hidden: of the convolutions before and after it.
        in_channels: of what the first module takes; by default those of its first convolution.
        relu: whether to end with a ReLU, as most blocks do.

    Raises:
        ValueError: a number below 1; a name that the model does not have, that is there twice or
            lies inside another one; modules that do not run in a row, or give something other than
            maps, or maps whose size does not follow from a stride (adaptive pooling).

    Source: Matsubara et al., 2019, https://doi.org/10.1145/3349614.3356022, for the idea of the
    bottleneck; its layers are published for a few architectures only and are not these.
    """
    for name, value in (("channels", channels), ("hidden", hidden), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise ValueError(f"bottlenecked: {name} must be a number > 0, got {value!r}")
    parts = _find(model, replace)
    inputs = in_channels or _input_channels(replace[0], parts[replace[0]])
    outputs, (high, wide) = measured(parts, inputs)
    steps = list(zip_longest(steps_of(*high), steps_of(*wide), fillvalue=step_of(1, 0)))
    bottleneck = Bottleneck((inputs, channels, outputs), hidden, steps, relu)
    bottleneck.to(*placement(parts)).train(parts[replace[0]].training)
    for path in replace:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    parent, _, name = replace[0].rpartition(".")
    setattr(model.get_submodule(parent), name, bottleneck)
    return model


def _find(model: nn.Module, replace: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules of these names, in their order."""
    known = dict(model.named_modules())
    if not replace:
        raise ValueError("bottlenecked: replace must name one module at least, got an empty list")
    for path in replace:
        if not path or path not in known:
            near = " or ".join(get_close_matches(path, known))
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"bottlenecked: the model has no module {path!r}{hint}")
        outer = [other for other in replace if path.startswith(f"{other}.")]
        if outer or list(replace).count(path) > 1:
            where = (
                f"lies inside {outer[0]!r}, which is replaced too" if outer else "is there twice"
            )
            raise ValueError(f"bottlenecked: in replace, {path!r} {where}")
    return {path: known[path] for path in replace}


def _input_channels(path: str, part: nn.Module) -> int:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(
        f"bottlenecked: {path!r} has no convolution to take the number of input channels from; "
        "give in_channels"
    )
