"""Contrastive representation distillation: embeddings against banks of the other network's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import numpy
import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill import DataError, claim, gather, labels
from distill.parameters import Parametrized, check, check_choice
from distill_crd.memory_bank import last_of_each, momentum_rows, push, random_rows
from distill_crd.negative_pools import Pools
from distill_crd.negatives import NONE, Classes
from distill_crd.noise_contrast import Negatives, exponential_sums, log_noise_sums

Positive = Literal["exact", "relaxed"]
Exclude = Literal["class", "sample"]

SMALLEST_TEMPERATURE = 0.0125
BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_ROWS_FOR_ONE = 16
"""Banks of up to so many rows a negative are multiplied in whole; with more it would cost more than
to fetch each negative by itself."""


class CRDLoss(Parametrized):
    r"""Tell a sample's embedding by the other network from those of samples of other classes.

    Each network has a bank of embeddings, a row for every sample of the training data. With
    :math:`x = \exp(v \cdot e / temperature) / Z` for a student's embedding e and a row v of the
    teacher's bank, K negatives, N samples and :math:`q = K / N`

    .. math::
        \ell = -\log \frac{x_0}{x_0 + q + \epsilon}
               - \sum_{k=1}^K \log \frac{q}{x_k + q + \epsilon},

    averaged over the batch; the same for the teacher's embedding and the student's bank; the loss
    is the sum of both. Z is a constant for each bank: the mean of the exponentials times N, of the
    first batch. After the scores the rows of the batch become
    :math:`momentum \cdot v + (1 - momentum) \cdot e`, of length 1.

    Negatives are drawn anew for every sample and batch, as a function of the experiment's seed, the
    number of batches so far and the sample, so on however many processes. They are of other
    classes, all different; if a class leaves fewer than ``negatives``, they are all that there
    are. Each sample, and each pair of samples, is as likely as in a draw without
    replacement, but for what is rejected: of 60 samples drawn 8 at a time, some come 1.5 % more or
    less often and some pairs a fifth, and the more are drawn the less it is (0.1 % and 2 % for 60
    of 307). How likely three are to come together depends on how they stand in a row of all
    samples, which is shuffled once.

    Args:
        negatives: K, for each sample.
        temperature: of the products.
        momentum: how much of its old value a row keeps.
        positive: ``"exact"``, the sample's own row; or ``"relaxed"``, that of some sample of its
            class.
        exclude: ``"class"``, negatives are of other classes; or ``"sample"``, they are any other
            samples, as for data without labels.
        shared_negatives: draw one set of K for the whole batch, of which each sample uses those of
            other classes; a product of matrices instead of K rows a sample. What a step sees of the
            bank is B times less, and what one set has by chance all samples of the batch feel.
        queue: instead of a row for each sample, keep the last ``queue`` embeddings of all
            processes; those of other classes are the negatives, ``negatives`` and ``momentum`` go
            unused, and the positive is the other network's embedding of this very step, without
            gradient. For data whose banks do not fit. It is MoCo's way (He et al., CVPR 2020), not
            CRD's.
        bank_dtype: ``float32``; ``bfloat16`` and ``float16`` halve the banks, whose rows are then
            rounded, and products with them are taken in that type.
        eps: added to the noise.
        ratio: below 1, the negatives of a class come from so large a part of the samples of others,
            chosen for each class once and for all, whatever the experiment's seed.

    Shape:
        - student_embedding, teacher_embedding: (B, D), of length 1, as ``CRDEmbedding`` gives them.
          Both get gradients.
        - index: positions in the data set, int64 (B).
        - returns: scalar. It is a mean over the samples of a process, whose negatives do not depend
          on the process: processes together give the loss of one with the whole batch. Banks are
          brought up to date from the embeddings of all processes, alike on each.

    Raises:
        ValueError: a parameter out of range; data that has no class labels, or one class only;
            banks for which there is no memory. What they take is printed before.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020,
    https://arxiv.org/abs/1910.10699. The authors' code draws negatives in the data loader, repeats
    them if there are too few, and keeps Z and banks of its own on each process.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    constants: Tensor
    seed: Tensor
    steps: Tensor
    queued: Tensor
    pushed: Tensor
    classes: Classes
    pools: Pools | None

    def __init__(
        self,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        positive: Positive = "exact",
        exclude: Exclude = "class",
        shared_negatives: bool = False,
        queue: int | None = None,
        bank_dtype: torch.dtype = torch.float32,
        eps: float = 1e-7,
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        check(self, "negatives", negatives, negatives > 0, "a whole number > 0")
        fits = SMALLEST_TEMPERATURE <= temperature < math.inf
        allowed = f"at least {SMALLEST_TEMPERATURE} (below, exponentials leave float32)"
        check(self, "temperature", temperature, fits, allowed)
        check(self, "momentum", momentum, 0 <= momentum < 1, "from 0 to below 1")
        check_choice(self, "positive", positive, get_args(Positive))
        check_choice(self, "exclude", exclude, get_args(Exclude))
        check(self, "queue", queue, queue is None or queue > 0, "a whole number > 0")
        alone = not shared_negatives and positive == "exact"
        check(
            self, "queue", queue, queue is None or alone, "None with shared_negatives or positive"
        )
        fits = bank_dtype in BANK_DTYPES
        check(self, "bank_dtype", bank_dtype, fits, "float32, bfloat16 or float16")
        check(self, "eps", eps, eps >= 0, ">= 0")
        check(self, "ratio", ratio, 0 < ratio <= 1, "above 0 and at most 1")
        fits = ratio == 1 or not (shared_negatives or queue)
        check(self, "ratio", ratio, fits, "1 with shared_negatives or queue")
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.positive = positive
        self.exclude = exclude
        self.shared_negatives = shared_negatives
        self.queue = queue
        self.bank_dtype = bank_dtype
        self.eps = eps
        self.ratio = ratio
        self._is_held = False
        self._has_constants = False

    def setup(
        self, student_embedding: Tensor, teacher_embedding: Tensor, index: Tensor, dataset: Any
    ) -> None:
        """Find the classes of the data, and allocate the banks.

        Raises:
            ValueError: as the class says.
        """
        student, _ = _checked(student_embedding, teacher_embedding, index)
        device, width = student.device, student.shape[1]
        rows = len(dataset) if self.queue is None else self.queue
        claim(
            2 * rows * width * self.bank_dtype.itemsize,
            device,
            f"two banks of {rows:,} x {width} {str(self.bank_dtype).removeprefix('torch.')}",
            "bank_dtype: bfloat16 halves them, "
            + ("a shorter queue has fewer rows" if self.queue else "queue bounds their rows"),
        )
        # Which may take a while, and is in vain where there is no room.
        classes = self._classes_of(dataset)
        self.pools = Pools(classes, self.ratio).to(device) if self.ratio < 1 else None
        self.classes = classes.to(device)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, random_rows(rows, width, self.bank_dtype, device))
        unset = torch.full((2,), -1.0, dtype=student.dtype, device=device)
        self.register_buffer("constants", unset)
        self.register_buffer("seed", torch.randint(2**62, (), device="cpu").to(device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        if self.queue is not None:
            self.register_buffer("queued", torch.full((rows,), -1, device=device))
            self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))

    def forward(
        self, student_embedding: Tensor, teacher_embedding: Tensor, index: Tensor
    ) -> Tensor:
        """Return the loss, and bring the banks up to date if in train mode."""
        if not hasattr(self, "classes"):
            raise RuntimeError("CRDLoss has no banks yet: call setup with embeddings and data")
        embeddings = _checked(student_embedding, teacher_embedding, index)
        # Autocast would multiply in half precision.
        with torch.autocast(index.device.type, enabled=False):
            return self._loss(embeddings, index)

    def _loss(self, embeddings: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        key = self.seed + self.steps
        negatives_in = self._negatives(index, key)
        positives = self._positives(index, key, embeddings)
        sides = [
            (embedding, positive, negatives_in(bank))
            for embedding, positive, bank in zip(embeddings, positives, self._banks(), strict=True)
        ]
        constants = self._constants(sides)
        losses = [self._side(*side, z) for side, z in zip(sides, constants, strict=True)]
        if self.training and not self._is_held:
            self._follow(constants, embeddings, index)
        return (losses[0] + losses[1]).mean()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leave banks, constants and steps as they are for as long as the context lasts."""
        was_held, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = was_held

    def _banks(self) -> tuple[Tensor, Tensor]:
        """Return the bank that each side is scored with: that of the other one."""
        return self.teacher_bank, self.student_bank

    def _classes_of(self, dataset: Any) -> Classes:
        if self.exclude == "sample":
            return Classes(torch.full((len(dataset),), -1), self.negatives)
        try:
            # Eight times as fast as a tensor of a list.
            known = torch.from_numpy(numpy.fromiter(labels(dataset), numpy.int64))
        except DataError as error:
            raise ValueError(f"{error}; exclude: sample does without them") from error
        found = Classes(known, self.negatives)
        if len(found.members) == 1:
            raise ValueError(
                f"all {len(known):,} samples of the data are of one class, which leaves no "
                "negatives; exclude: sample takes those of the same class"
            )
        return found

    def _negatives(self, index: Tensor, key: Tensor) -> Callable[[Tensor], Negatives]:
        """Return what gives a batch's negatives of a bank."""
        if self.queue is not None:
            return _marked(self.queued[:, None] != self.classes.of[index])
        if self.shared_negatives:
            return self._shared(index, key)
        if self.pools is None and len(self.classes) <= MOST_ROWS_FOR_ONE * self.negatives:
            marked, count = self.classes.marked(index, key)
            return partial(Negatives, count=count, marked=marked)
        found, kept, count = (self.pools or self.classes).listed(index, key)
        found.clamp_(max=len(self.classes) - 1)  # what is no sample is not kept
        return partial(Negatives, count=count, index=found, kept=kept)

    def _shared(self, index: Tensor, key: Tensor) -> Callable[[Tensor], Negatives]:
        found, of = self.classes.shared(key)
        found.clamp_(max=len(self.classes) - 1)
        is_other = of[:, None] != self.classes.of[index]
        with_marks = _marked(is_other.logical_and_((of != NONE)[:, None]))
        return lambda bank: with_marks(bank[found])

    def _positives(
        self, index: Tensor, key: Tensor, embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what each side is to be told by, (B, D), without gradient."""
        if self.queue is not None:
            return embeddings[1].detach(), embeddings[0].detach()
        if self.positive == "relaxed":
            index = self.classes.same(index, key)
        of_student, of_teacher = (bank[index].to(embeddings[0].dtype) for bank in self._banks())
        return of_student, of_teacher

    def _constants(self, sides: list[tuple[Tensor, Tensor, Negatives]]) -> Tensor:
        """Return Z of the student's side and of the teacher's, from this batch if not set yet."""
        if self._has_constants:
            return self.constants
        means = []
        for embedding, positive, negatives in sides:
            sums = exponential_sums(embedding, negatives, self.temperature)
            sums += ((embedding * positive).sum(1) / self.temperature).exp().detach()
            means.append(gather(sums / (negatives.count + 1)).mean())
        return torch.stack(means) * len(self.classes)

    def _side(
        self, embedding: Tensor, positive: Tensor, negatives: Negatives, constant: Tensor
    ) -> Tensor:
        """Return the loss of one side for each sample, (B)."""
        count = negatives.count
        prior = count.clamp_min(1).to(embedding.dtype) / len(self.classes)
        noise = (prior + self.eps) * constant
        score = (embedding * positive).sum(1) / self.temperature
        # log(1 + noise / exp(score)), whose quotient's square, which its gradient has, is too much
        # for float32 at low temperatures.
        of_positive = softplus(noise.log() - score, threshold=40)
        of_negatives = log_noise_sums(embedding, negatives, self.temperature, noise)
        return of_positive + of_negatives + count * (self.eps / prior).log1p()

    @torch.no_grad()
    def _follow(self, constants: Tensor, embeddings: tuple[Tensor, Tensor], index: Tensor) -> None:
        """Let banks follow the embeddings of all processes, alike on each; count the batch."""
        self.steps += 1
        if not self._has_constants:
            self.constants.copy_(constants)
            self._has_constants = True
        index, both = gather(index), gather(torch.cat(embeddings, 1))
        banks = self.student_bank, self.teacher_bank
        if self.queue is None:
            latest = both[last_of_each(index)].chunk(2, 1)
            for bank, rows in zip(banks, latest, strict=True):
                bank[index] = momentum_rows(bank, index, rows, self.momentum).to(bank.dtype)
            return
        newest = *both.chunk(2, 1), self.classes.of[index]
        for queue, rows in zip((*banks, self.queued), newest, strict=True):
            push(queue, self.pushed, rows)
        self.pushed += len(index)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_constants = hasattr(self, "constants") and bool((self.constants > 0).all())


def _checked(student: Tensor, teacher: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return both embeddings in float32, or in float64 if one of them is.

    Raises:
        ValueError: if they are of different widths, or the index is not theirs.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            "CRDLoss: embeddings must be (B, D) and of the same width, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; give both CRDEmbedding the same "
            "out_features"
        )
    if not len(student) or index.shape != student.shape[:1] or index.dtype != torch.int64:
        raise ValueError(
            "CRDLoss: index must give the position in the data set, int64, of each of "
            f"{len(student)} embeddings, at least one; it is {index.dtype} {tuple(index.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.promote_types(teacher.dtype, torch.float32))
    return student.to(dtype), teacher.to(dtype)


def _marked(marked: Tensor) -> Callable[[Tensor], Negatives]:
    return partial(Negatives, count=marked.sum(0), marked=marked)
