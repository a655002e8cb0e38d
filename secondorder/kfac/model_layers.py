"""The layers of a model with Kronecker factors, read again when the model has changed.

A model is read when the optimiser is made. Later a user may unfreeze parameters, put in another head, tie, prune or parametrise
weights, or change their number format or device. `ModelLayers` finds that out by comparing the model with what it was, which
takes microseconds, and tells what to do about it: a layer whose modules, weight and bias are still the same keeps its statistics,
all others begin anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_

from torch import nn

from secondorder.kfac.layers import KroneckerLayer, Treatment, find_layers
from secondorder.kfac.options import Options


@dataclass(frozen=True)
class Change:
    """What is different after a model was read again.

    fresh: names of the layers that begin anew. parameters: those that are treated otherwise than before, what an optimiser
    has accumulated for them is of another kind. modules: whether modules or parameters came or went. event: a sentence.
    """

    fresh: frozenset[str]
    parameters: frozenset[nn.Parameter]
    modules: bool
    event: str


class ModelLayers:
    """The layers of a model by name, and the treatment of every parameter, in the order of the model."""

    def __init__(
        self, model: nn.Module, approximation: str | Mapping[str, str], sharing: str, options: Options
    ) -> None:
        self.model, self._approximation, self._sharing, self._options = model, approximation, sharing, options
        layers, self.treatments = self._found()
        self.layers: dict[str, KroneckerLayer] = {layer.name: layer for layer in layers}
        self._note()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the model by name, in its order."""
        return {t.name: t.parameter for t in self.treatments}

    @property
    def same_modules(self) -> bool:
        """Whether the modules and parameters of the model, and their names, are those that were read."""
        if list(map(len, self._tables)) != self._lengths or list(chain.from_iterable(self._tables)) != self._names:
            return False
        return all(map(is_, chain.from_iterable(table.values() for table in self._tables), self._contents))

    @property
    def changed(self) -> bool:
        """Whether the model is to be read again: its modules are not the same, or a frozen parameter has become trainable."""
        return any(parameter.requires_grad for parameter in self._frozen) or not self.same_modules

    @property
    def moved(self) -> bool:
        """Whether a parameter has changed its number format or device since `note_formats`."""
        return any(p.dtype != dtype or p.device != device for p, dtype, device in self._formats)

    def note_formats(self) -> None:
        """Note number format and device of each parameter."""
        parameters = [t.parameter for t in self.treatments]
        self._formats = [(p, p.dtype, p.device) for p in parameters]

    def read_again(self, step: int) -> Change:
        """Find layers and treatments anew; InputError, and nothing has changed, where `find_layers` refuses the model."""
        before = {t.parameter: t for t in self.treatments}
        trained = [t.parameter for t in self.treatments if t.how != "frozen"]
        layers, treatments = self._found(trained)
        old = dict(self.layers)
        kept = {layer.name for layer in layers if layer.name in old and old[layer.name].is_same(layer)}
        fresh = frozenset(layer.name for layer in layers if layer.name not in kept)
        adopted = [t for t in treatments if t.how != "frozen" and _how(before.get(t.parameter)) == "frozen"]
        other = [t for t in treatments if t not in adopted and _differs(before.get(t.parameter), t, fresh)]
        present = {t.parameter for t in treatments}
        gone = [t for parameter, t in before.items() if parameter not in present]
        modules = not self.same_modules
        self.layers.clear()
        self.layers.update((layer.name, old[layer.name] if layer.name in kept else layer) for layer in layers)
        self.treatments = treatments
        self._note()
        parts = [("adopted", adopted), ("treated otherwise", other), ("no longer in the model", gone)]
        listed = "; ".join(f"{len(found)} {what} ({_names(found)})" for what, found in parts if found)
        event = f"the model was found changed in step {step}, parameters: {listed or 'the same'}"
        return Change(fresh, frozenset(t.parameter for t in [*adopted, *other, *gone]), modules, event)

    def _found(self, trained: Sequence[nn.Parameter] | None = None) -> tuple[list[KroneckerLayer], list[Treatment]]:
        options = self._options
        rest = options.wide_inputs, options.wide_outputs, options.treat_as, trained
        return find_layers(self.model, self._approximation, self._sharing, *rest)

    def _note(self) -> None:
        """Note what the model consists of."""
        self._tables: list[Mapping[str, object]] = [
            table for module in self.model.modules() for table in (module._modules, module._parameters)
        ]
        self._lengths, self._names = list(map(len, self._tables)), list(chain.from_iterable(self._tables))
        self._contents = list(chain.from_iterable(table.values() for table in self._tables))
        self._frozen = [t.parameter for t in self.treatments if t.how == "frozen"]
        self.note_formats()


def _how(treatment: Treatment | None) -> str:
    return "frozen" if treatment is None else treatment.how


def _differs(before: Treatment | None, now: Treatment, fresh: Iterable[str]) -> bool:
    """Whether a parameter that was trained is treated otherwise now, or in a layer that begins anew."""
    return before is not None and (now.how != before.how or now.layer != before.layer or now.layer in set(fresh))


def _names(treatments: Sequence[Treatment]) -> str:
    return ", ".join([*(t.name for t in treatments[:3]), *(["..."] if len(treatments) > 3 else [])])
