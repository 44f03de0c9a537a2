"""What every loss should pass."""

from __future__ import annotations

import torch
from torch import nn

from distill import randomness


class LossConformance:
    """What every distillation loss should pass; inherit it and say how to build the loss.

    >>> class TestKDLoss(LossConformance):
    ...     teacher = "teacher"
    ...
    ...     def make(self):
    ...         return KDLoss(temperature=4.0, alpha=0.0)
    ...
    ...     def tensors(self, batch):
    ...         return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}

    Attributes:
        student: the parameter of ``forward`` through which gradients reach the student.
        teacher: the one that takes what the teacher gives, ``None`` if there is none; it must have
            the student's shape in ``tensors``.
    """

    student = "student"
    teacher: str | None = None

    def make(self) -> nn.Module:
        """Build the loss."""
        raise NotImplementedError

    def tensors(self, batch: int) -> dict[str, torch.Tensor]:
        """Return arguments of ``forward`` for ``batch`` samples; tensors as float32."""
        raise NotImplementedError

    def test_loss_is_a_finite_scalar(self) -> None:
        loss = self.make()(**self._tensors())
        assert loss.dim() == 0
        assert torch.isfinite(loss)

    def test_loss_and_gradient_are_finite_where_student_equals_teacher(self) -> None:
        given = self._tensors()
        if self.teacher is not None:
            given[self.teacher] = given[self.student].detach().clone()
        self._assert_finite(given)

    def test_loss_and_gradient_are_finite_for_extreme_values(self) -> None:
        for factor in (0.0, 1e4):
            given = self._tensors()
            for name in filter(None, (self.student, self.teacher)):
                given[name] = given[name].detach() * factor
            self._assert_finite(given)

    def test_loss_and_gradient_are_finite_for_a_single_sample(self) -> None:
        self._assert_finite(self._tensors(1))

    def test_gradient_reaches_the_student_and_not_the_teacher(self) -> None:
        given = self._tensors()
        for name in filter(None, (self.student, self.teacher)):
            given[name].requires_grad_()
        self.make()(**given).backward()
        gradient = given[self.student].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        if self.teacher is not None:
            reached = given[self.teacher].grad
            assert reached is None or not reached.any()

    def test_gradient_is_that_of_the_formula(self) -> None:
        loss = self.make().double()
        given = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in self._tensors().items()
        }

        def of_student(student: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = loss(**{**given, self.student: student})
            return value

        assert torch.autograd.gradcheck(of_student, given[self.student].requires_grad_())

    def test_reduced_precision_is_close_to_full(self) -> None:
        given = self._tensors()
        rounded = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
        }
        loss = self.make()
        torch.testing.assert_close(loss(**rounded).float(), loss(**given), rtol=0.05, atol=0.05)

    def _tensors(self, batch: int = 4) -> dict[str, torch.Tensor]:
        with randomness.torch_forked():
            torch.manual_seed(0)
            return self.tensors(batch)

    def _assert_finite(self, given: dict[str, torch.Tensor]) -> None:
        given[self.student].requires_grad_()
        loss = self.make()(**given)
        loss.backward()
        assert torch.isfinite(loss)
        gradient = given[self.student].grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
