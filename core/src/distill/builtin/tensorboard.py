"""A run as TensorBoard events, one folder a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill import EpochEnd, EvaluationEnd, Observer, RunEnd, RunStart, StepEnd

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Observer):
    """Writes losses a log line, and losses and metrics an epoch, under ``<run>/tensorboard``.

    With ``term_gradients``, over steps: ``gradient norm/<term>``, ``gradient share/<term>``,
    ``gradient cosine/<term>.<term>``, ``term value/<term>`` and ``term weight/<term>``.
    """

    def run_start(self, event: RunStart) -> None:
        """Remember where to write."""
        # Here, since a check of a file, which writes nothing, need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._root: Path = event.directory / "tensorboard"
        self._writers: dict[tuple[int, str], SummaryWriter] = {}
        self._files = event.files

    def step_end(self, event: StepEnd) -> None:
        """Write a log line's losses and speed."""
        writer = self._writer(event.position.seed, event.stage)
        self._scalars(writer, "step", event.losses, event.position.step)
        speed = event.samples_per_second
        self._scalars(writer, "weight", event.weights, event.position.step)
        writer.add_scalar("speed/samples_per_second", speed, event.position.step)
        measured = event.term_gradients
        if measured is not None:
            for group, values in (
                ("gradient norm", measured.norms),
                ("gradient share", measured.shares),
                ("gradient cosine", measured.cosines),
                ("term value", measured.values),
                ("term weight", measured.weights),
            ):
                self._scalars(writer, group, values, event.position.step)

    def evaluation_end(self, event: EvaluationEnd) -> None:
        """Write a measurement in the middle of an epoch, over steps."""
        writer = self._writer(event.position.seed, event.stage)
        self._scalars(writer, "validation at step", event.metrics, event.position.step)

    def epoch_end(self, event: EpochEnd) -> None:
        """Write an epoch's losses, metrics and learning rate."""
        writer = self._writer(event.position.seed, event.stage)
        epoch = event.position.epoch
        self._scalars(writer, "train", event.losses, epoch)
        self._scalars(writer, "validation", event.metrics, epoch)
        writer.add_scalar("train/lr", event.lr, epoch)
        writer.flush()

    def run_end(self, event: RunEnd) -> None:
        """Write the table and the experiment as text."""
        writer = self._open(str(self._root))
        writer.add_text("results", f"{event.table}\n\n({event.measured_on})")
        for name, text in self._files.items():
            writer.add_text(name, "```yaml\n" + text + "\n```")
        writer.close()

    def close(self) -> None:
        """Write what is left."""
        for writer in getattr(self, "_writers", {}).values():
            writer.close()

    def _writer(self, seed: int, stage: str) -> SummaryWriter:
        key = (seed, stage)
        if key not in self._writers:
            self._writers[key] = self._open(str(self._root / f"seed-{seed}" / stage))
        return self._writers[key]

    @staticmethod
    def _scalars(writer: SummaryWriter, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, step)
