"""What products are made of for a data set that is read batch by batch: the loss of its samples, random numbers, Jacobian.

A mean loss over N samples is divided by what is counted over the whole data set: samples, numbers, or weights of the labels that
count. Sums over batches then are those over one batch of all.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.batch_stream import BatchStream
from secondorder.curvature.matrix_free.batches import Batch
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.loss_curvature import Loss, as_it_is, loss_curvature, loss_name
from secondorder.curvature.matrix_free.separable_losses import LossCurvature, LossParts, SeparableLoss, Totals
from secondorder.curvature.matrix_free.trial import trial_samples
from secondorder.curvature.resuming.keys import Key
from secondorder.curvature.resuming.long_run import watched
from secondorder.errors import InputError

CUT = "over several batches the result would depend on how the data are cut; use eval(), or give one batch of all data"


class StreamedLoss(LossParts):
    """A loss of the samples of a data set, outputs of a sample of the given shape; a part is of samples of one batch.

    Made by a pass over the data. Raises InputError for a loss that is not known to be a sum over samples.
    """

    def __init__(self, stream: BatchStream, loss: Loss, outputs: torch.Size, dtype: torch.dtype) -> None:
        self.stream = stream
        self._loss, self._outputs, self._dtype = as_it_is(loss), outputs, dtype
        self._present: tuple[Batch, LossCurvature] | None = None
        self.totals: Totals | None = Totals(1, 1.0)
        divisor = 0.0
        for _, batch in watched(stream.batches(), "normalisation of the loss", stream.count):
            made = self._of(batch)
            if not made.separable:
                raise InputError(
                    f"{loss_name(loss)} is not known to be a sum over the samples, so that nothing tells what it is of several "
                    "batches; use SumOverSamples, divided by a number of your own in place of a mean"
                )
            divisor += made.mean_divisor if isinstance(made, SeparableLoss) else 0.0
        self.totals = Totals(len(stream), divisor)
        self.of_few = self._of(stream.few)
        """The loss of a few samples, with the normalisation of all."""
        self.factored = self.of_few.factored

    @property
    def settings(self) -> object:
        """The loss and what a mean of it is divided by; its labels are the stream's."""
        return self._loss, self.totals

    def part(self, rows: slice) -> LossCurvature:
        """The summands of some samples of one batch, with the normalisation of the data set."""
        batch = self.stream.whole(rows)
        if self._present is None or self._present[0] is not batch:
            self._present = batch, self._of(batch)
        return self._present[1].part(self.stream.within(rows))

    def _of(self, batch: Batch) -> LossCurvature:
        shape = torch.Size([len(batch), *self._outputs])
        return loss_curvature(self._loss, shape, batch.labels, self._dtype, self.totals)


class StreamedNoise:
    """The random numbers `[N, ..., S]` of S labels drawn for each sample, those of one batch of all, made batch by batch.

    Of each batch the state of the random numbers is kept. Made by a pass over the data.
    """

    def __init__(self, loss: StreamedLoss, samples: int, source: torch.Generator) -> None:
        self._loss, self._samples = loss, samples
        self.states: list[Tensor] = []
        """Of the random numbers, for each batch."""
        self._present: tuple[int, Tensor] | None = None
        self.nbytes = 0
        for rows, _ in watched(loss.stream.batches(), "random labels", loss.stream.count):
            self.states.append(source.get_state())
            drawn = self._drawn(rows, source)
            self.nbytes = max(self.nbytes, drawn.nbytes)
        self.nbytes += sum(state.nbytes for state in self.states)
        self.shape = torch.Size([len(loss.stream), *drawn.shape[1:]])

    def __getitem__(self, rows: slice) -> Tensor:
        stream = self._loss.stream
        number = stream.number(rows)
        if self._present is None or self._present[0] != number:
            source = torch.Generator()
            source.set_state(self.states[number])
            whole = stream.within(rows)
            start = rows.start - whole.start
            self._present = number, self._drawn(slice(start, start + len(stream.whole(rows))), source)
        return self._present[1][stream.within(rows)]

    def _drawn(self, rows: slice, source: torch.Generator) -> Tensor:
        part = self._loss.part(rows)
        assert isinstance(part, SeparableLoss)
        return part.noise(self._samples, source)


class StreamedJacobian(Jacobian):
    """J of a data set, batch by batch, each in parts of at most `chunk` samples; no graph is kept.

    Formulas are tried on the stream's few samples.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        stream: BatchStream,
        chunk: int,
        layers: Mapping[nn.Module, nn.Module | None],
        block_bytes: int,
        width: int,
    ) -> None:
        super().__init__(network, stream, chunk, False, layers, block_bytes)
        self.stream = stream
        self._width = width

    @property
    def width(self) -> int:
        """K, the numbers in the outputs of a sample."""
        return self._width

    @property
    def part_count(self) -> int:
        """How many parts all batches have."""
        return sum(-(-size // self.chunk) for size in self.stream.sizes)

    def parts(self, first: int = 0) -> Iterator[Linearisation]:
        """The linearised parts in the order of the samples, from the part number `first` on; batches before it are read only.

        InputError when parameters or data have changed.
        """
        self.network.check_unchanged()
        number = 0
        for rows, _ in self.stream.batches():
            for start in range(rows.start, rows.stop, self.chunk):
                number += 1
                if number <= first:
                    continue
                part = self.linearised(slice(start, min(start + self.chunk, rows.stop)), 0)
                if self.network.random.drawn:
                    raise InputError(f"the network draws random numbers for some of the data; {CUT}")
                yield part

    def _data_fingerprint(self) -> Key:
        return self.stream.fingerprint()

    def trial(self, most: int | None = None) -> Linearisation:
        """Few samples to try formulas on, at most `most` so many."""
        few = self.stream.few.inputs
        chosen = trial_samples(few, self.chunk if most is None else most)
        return Linearisation(self.network, few[chosen], slice(None), 0, self.layers)
