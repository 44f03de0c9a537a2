"""Contrastive representation distillation: embeddings against banks of the other network's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from distill import DataError, claim, gather, labels
from distill_crd.memory_bank import last_of_each, momentum_rows, push, random_rows
from distill_crd.negatives import Classes, draw, draw_same, draw_shared, mark
from distill_crd.noise_contrast import Negatives, exponential_sums, log_noise_sums
from distill_crd.parameters import Parametrized, check, check_choice, check_positive

Positive = Literal["exact", "relaxed"]
Exclude = Literal["class", "sample"]

MOST_ROWS_FOR_ONE = 8
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
    first step. After the scores the rows of the batch become
    :math:`momentum \cdot v + (1 - momentum) \cdot e`, of length 1.

    Negatives are drawn anew for every sample and step, as a function of the experiment's seed, the
    step and the sample, so on however many processes. They are of other classes, all different as
    long as there are enough; of a class that leaves fewer than ``negatives``, each comes once and
    counts as one.

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
    them if there are too few, and adds Z and the banks up on each process by itself.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    constants: Tensor
    seed: Tensor
    steps: Tensor
    queued: Tensor
    pushed: Tensor
    order: Tensor
    of: Tensor
    first: Tensor
    members: Tensor
    strides: Tensor

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
    ) -> None:
        super().__init__()
        check(self, "negatives", negatives, negatives > 0, "a whole number > 0")
        check_positive(self, "temperature", temperature)
        check(self, "momentum", momentum, 0 <= momentum < 1, "from 0 to below 1")
        check_choice(self, "positive", positive, get_args(Positive))
        check_choice(self, "exclude", exclude, get_args(Exclude))
        check(self, "queue", queue, queue is None or queue > 0, "a whole number > 0")
        check(self, "bank_dtype", bank_dtype, bank_dtype.is_floating_point, "a floating type")
        check(self, "eps", eps, eps >= 0, ">= 0")
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.positive = positive
        self.exclude = exclude
        self.shared_negatives = shared_negatives
        self.queue = queue
        self.bank_dtype = bank_dtype
        self.eps = eps
        self._is_held = False
        self._has_constants = False

    def setup(
        self, student_embedding: Tensor, teacher_embedding: Tensor, index: Tensor, dataset: Any
    ) -> None:
        """Find the classes of the data, and allocate the banks.

        Raises:
            ValueError: as the class says.
        """
        device, width = student_embedding.device, student_embedding.shape[1]
        rows = len(dataset) if self.queue is None else self.queue
        self._know(self._classes_of(dataset), device)
        claim(
            2 * rows * width * self.bank_dtype.itemsize,
            device,
            f"two banks of {rows:,} x {width} {str(self.bank_dtype).removeprefix('torch.')}",
            "bank_dtype: bfloat16 halves them, queue bounds their rows",
        )
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, random_rows(rows, width, self.bank_dtype, device))
        unset = torch.full((2,), -1.0, dtype=student_embedding.dtype, device=device)
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
        key = self.seed + self.steps
        negatives_in = self._negatives(index, key)
        embeddings = (student_embedding, teacher_embedding)
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
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _banks(self) -> tuple[Tensor, Tensor]:
        """Return the bank that each side is scored with: that of the other one."""
        return self.teacher_bank, self.student_bank

    def _classes_of(self, dataset: Any) -> Classes:
        if self.exclude == "sample":
            return Classes.found(torch.full((len(dataset),), -1))
        try:
            known = torch.tensor(labels(dataset))
        except DataError as error:
            raise ValueError(f"{error}; exclude: sample does without them") from error
        found = Classes.found(known)
        if len(found.members) == 1:
            raise ValueError(
                f"all {len(known):,} samples of the data are of one class, which leaves no "
                "negatives; exclude: sample takes those of the same class"
            )
        return found

    def _know(self, classes: Classes, device: torch.device) -> None:
        for name, value in vars(classes).items():
            self.register_buffer(name, value.to(device), persistent=False)
        fewest = len(classes) - int(classes.members.max())
        few_rows = len(classes) <= MOST_ROWS_FOR_ONE * self.negatives
        # Marked, a negative that is drawn again is the same mark.
        self._is_marked = few_rows or fewest < self.negatives

    @property
    def classes(self) -> Classes:
        """The samples of the data by class."""
        return Classes(self.order, self.of, self.first, self.members, self.strides)

    def _negatives(self, index: Tensor, key: Tensor) -> Callable[[Tensor], Negatives]:
        """Return what gives a batch's negatives of a bank."""
        if self.queue is not None:
            return _marked(self.queued[:, None] != self.of[index])
        if self.shared_negatives:
            shared = draw_shared(self.classes, self.negatives, key)
            of_shared = _marked(self.of[shared, None] != self.of[index])
            return lambda bank: of_shared(bank[shared])
        count = self.classes.others(index).clamp(max=self.negatives)
        if self._is_marked:
            marked = mark(self.classes, index, self.negatives, key)
            return partial(Negatives, count=count, marked=marked)
        drawn = draw(self.classes, index, self.negatives, key)
        return partial(Negatives, count=count, index=drawn)

    def _positives(
        self, index: Tensor, key: Tensor, embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what each side is to be told by, (B, D), without gradient."""
        if self.queue is not None:
            return embeddings[1].detach(), embeddings[0].detach()
        if self.positive == "relaxed":
            index = draw_same(self.classes, index, key)
        of_student, of_teacher = (bank[index].to(embeddings[0].dtype) for bank in self._banks())
        return of_student, of_teacher

    def _constants(self, sides: list[tuple[Tensor, Tensor, Negatives]]) -> Tensor:
        """Return Z of the student's side and of the teacher's, from this step if not set yet."""
        if self._has_constants:
            return self.constants
        means = []
        for embedding, positive, negatives in sides:
            sums = exponential_sums(embedding, negatives, self.temperature)
            sums += ((embedding * positive).sum(1) / self.temperature).exp().detach()
            means.append(gather(sums / (negatives.count + 1)).mean())
        return torch.stack(means) * len(self.of)

    def _side(
        self, embedding: Tensor, positive: Tensor, negatives: Negatives, constant: Tensor
    ) -> Tensor:
        """Return the loss of one side for each sample, (B)."""
        count = negatives.count
        prior = count.clamp_min(1).to(embedding.dtype) / len(self.of)
        noise = prior + self.eps
        own = ((embedding * positive).sum(1) / self.temperature).exp() / constant
        of_negatives = log_noise_sums(embedding, negatives, self.temperature, noise * constant)
        return (1 + noise / own).log() + of_negatives + count * (self.eps / prior).log1p()

    @torch.no_grad()
    def _follow(self, constants: Tensor, embeddings: tuple[Tensor, Tensor], index: Tensor) -> None:
        """Let banks follow the embeddings of all processes, alike on each; count the step."""
        self.steps += 1
        if not self._has_constants:
            self.constants.copy_(constants)
            self._has_constants = True
        index = gather(index)
        student, teacher = gather(torch.cat(embeddings, 1)).chunk(2, 1)
        for bank, rows in ((self.student_bank, student), (self.teacher_bank, teacher)):
            if self.queue is None:
                rows = momentum_rows(bank, index, rows[last_of_each(index)], self.momentum)
                bank[index] = rows.to(bank.dtype)
            else:
                push(bank, self.pushed, rows)
        if self.queue is not None:
            push(self.queued, self.pushed, self.of[index])
            self.pushed += len(index)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_constants = bool((self.constants > 0).all())


def _marked(marked: Tensor) -> Callable[[Tensor], Negatives]:
    return partial(Negatives, count=marked.sum(0), marked=marked)
