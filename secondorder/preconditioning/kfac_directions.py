"""K-FAC's direction P g: what the K-FAC optimiser makes of a gradient, with P = (B kron A + lambda I)^-1 for each layer.

The factors, eigenbases and the meaning of damping are those of `secondorder.kfac`: weight and bias of a layer are one block,
relative damping is lambda = damping |F|_F^2 / tr F with F = B kron A of the layer (`secondorder.kfac.Damping`).

J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.matrix_free.batches import checked_tensors
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.loss_curvature import Loss, loss_name
from secondorder.errors import InputError, NonFiniteError, check_flag, check_number
from secondorder.kfac.distributed import Processes
from secondorder.kfac.gathering import Gathering
from secondorder.kfac.inverses import NO_CURVATURE, Factors, invert
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.inverses.wide import WideEigenbasis
from secondorder.kfac.layers import KroneckerLayer, find_layers
from secondorder.kfac.options import Fisher, check_damping
from secondorder.kfac.statistics import LayerStatistics
from secondorder.matrix_power.transforms import full_precision
from secondorder.preconditioning.directions import Batch, Direction, checked_gradient, loss_gradient, names_of
from secondorder.untouched import untouched

CHUNK = 128
"""Images whose graph is held at once, in a network that treats each image by itself."""


def kfac_direction(
    network: nn.Module,
    batch: Batch,
    damping: float,
    *,
    loss: Loss = F.cross_entropy,
    params: Iterable[str] | None = None,
    relative: bool = True,
    fisher: str = "exact",
    sharing: str = "expand",
    curvature_batch: Batch | None = None,
    gradient: Mapping[str, Tensor] | None = None,
) -> Direction:
    """P g of the named weights and biases of linear layers and convolutions by name, P = (B kron A + lambda I)^-1 of each layer.

    Args:
        network: any network with linear layers or convolutions; it is left as it is.
        batch: images `[N, ...]` and labels, of whose mean loss g is the gradient.
        damping: a positive number; lambda where it is not `relative`.
        loss, params, relative, fisher, sharing: see `KFACDirections`, whose errors this has, too.
        curvature_batch: of the factors; None: `batch`.
        gradient: g, when it is another one, with the names of `params`.
    """
    if params is None and gradient is not None:
        params = names_of(gradient)
    chosen = batch if curvature_batch is None else curvature_batch
    directions = KFACDirections(
        network, chosen, loss=loss, params=params, relative=relative, fisher=fisher, sharing=sharing
    )
    if gradient is None:
        gradient = loss_gradient(network, batch, loss=loss, params=directions.names)
    return directions.direction(gradient, damping)


class KFACDirections:
    """P g for any number of gradients and dampings, from factors and eigenbases that are made once.

    The network is evaluated in its present mode and left as it is, bit for bit.

    Args:
        network: any network with linear layers or convolutions.
        curvature_batch: images and labels; the labels matter only for fisher="empirical".
        loss: mean cross-entropy, squared error or binary cross-entropy on logits, without weights of classes.
        params: names of weights, with or without the bias beside them; None: all that K-FAC covers and that require gradients.
        relative: whether dampings are relative to the scale of each layer's block.
        fisher: "exact", "mc" or "empirical", as in `secondorder.kfac.Fisher`.
        sharing: "expand" or "reduce", as in `secondorder.kfac.KFAC`.

    Raises:
        InputError: for a parameter that K-FAC does not cover (batch norm), a bias without its weight, another loss, and a layer
            that is never called.
        NonFiniteError: when factors are not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        curvature_batch: Batch,
        *,
        loss: Loss = F.cross_entropy,
        params: Iterable[str] | None = None,
        relative: bool = True,
        fisher: str = "exact",
        sharing: str = "expand",
    ) -> None:
        check_flag("relative", relative)
        kind = Fisher(fisher, likelihood_of(loss))
        frozen = FrozenNetwork(network, params)
        batch = checked_tensors(curvature_batch, frozen)
        self.relative = relative
        self.events: Counter[str] = Counter()
        """What went wrong in decompositions, and "<layer>: no curvature, damping is absolute", as in the optimiser's report."""
        with untouched(network), torch.enable_grad(), full_precision(batch[0]):
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name in frozen.weights)
            self.layers, covered = _covered(network, sharing, list(frozen.weights), params is None)
            self._parameters = {name: frozen.parameters[name].detach() for name in covered}
            self._names = {id(frozen.parameters[name]): name for name in covered}
            whole = frozen.couples_samples() is not None or fisher == "empirical"
            statistics = _factors(network, self.layers, kind, batch, len(batch[0]) if whole else CHUNK, loss)
        self._inverses = self._inverted(statistics)

    @property
    def names(self) -> list[str]:
        """The parameters with a direction, in the network's order."""
        return list(self._parameters)

    @torch.no_grad()
    def direction(self, gradient: Mapping[str, Tensor], damping: float, power: float = 1.0) -> Direction:
        """P^p g = (B kron A + lambda I)^-p g for g = `gradient` of all `names`, tensors of the parameters' shapes.

        The power p of 1 is K-FAC's direction, 1/2 whitens as methods with a square root of the curvature do, 0 is g itself.
        Raises InputError for a damping that is not positive, a power outside [0, 1], other names or shapes; NonFiniteError.
        """
        check_damping(damping)
        check_number("power", power, 0, 1, "[]")
        found = checked_gradient(gradient, self._parameters)
        for layer in self.layers:
            weight = self._names[id(layer.weight)]
            bias = None if layer.bias is None else self._names[id(layer.bias)]
            W = layer.matrix(found[weight], None if bias is None else found[bias])
            with full_precision(W):
                solution = self._inverses[layer.name].solve(W, damping, self.relative, power)
            found[weight], b = layer.parts(solution)
            if bias is not None and b is not None:
                found[bias] = b
        return found

    def tikhonov(self, damping: float) -> dict[str, Tensor]:
        """lambda of each layer's groups `[G]`, or one number `[1]`, by the layer's name. Raises InputError for a bad damping."""
        check_damping(damping)
        values = {layer.name: self._inverses[layer.name].tikhonov(damping, self.relative) for layer in self.layers}
        return {name: torch.as_tensor(value).flatten() for name, value in values.items()}

    def _inverted(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, Rotated | WideEigenbasis]:
        factors = []
        for layer in self.layers:
            own = statistics[layer.name]
            if own.B is None:
                raise InputError(f"the network never calls the layer {layer.name}: no factors; leave it out of params")
            factors.append(Factors(layer.name, own.A, own.rows, own.B))
        found = invert(factors, "eigen", [1.0] * len(factors), self.relative, {}, self.events)
        if self.events["identity"]:
            raise NonFiniteError("the factors of a layer cannot be decomposed; use float64 or check the images")
        return {name: inverse for name, inverse in found.items() if isinstance(inverse, Rotated | WideEigenbasis)}

    @property
    def without_curvature(self) -> list[str]:
        """Layers whose block is zero, of which every direction is the gradient / damping."""
        return [layer.name for layer in self.layers if self.events[f"{layer.name}: {NO_CURVATURE}"]]


def _covered(
    network: nn.Module, sharing: str, wanted: Sequence[str], only_covered: bool
) -> tuple[list[KroneckerLayer], list[str]]:
    """The layers of the wanted parameters, which alone require gradients, and the parameters that have factors."""
    layers, treatments = find_layers(network, "kfac", sharing)
    by_parameter = {id(t.parameter): t for t in treatments}
    named = dict(network.named_parameters())
    covered = [name for name in wanted if by_parameter[id(named[name])].how == "kfac"]
    if not only_covered and len(covered) < len(wanted):
        name = next(name for name in wanted if name not in covered)
        why = by_parameter[id(named[name])].why
        raise InputError(
            f"K-FAC has no factors for {name} ({why}); name weights of linear layers and convolutions, or these and biases"
        )
    return layers, covered


def _factors(
    network: nn.Module, layers: Sequence[KroneckerLayer], fisher: Fisher, batch: Batch, chunk: int, loss: Loss
) -> Mapping[str, LayerStatistics]:
    """A and B of each layer, summed over parts of the batch."""
    gathering = Gathering(layers, network, fisher, Processes(False), check=False)
    try:
        gathering.begin(True, 0)
        for images, labels in zip(batch[0].split(chunk), batch[1].split(chunk), strict=True):
            logits = network(images.clone())
            if not isinstance(logits, Tensor):
                raise InputError(
                    f"the network returns a {type(logits).__name__}; K-FAC's direction needs one tensor of logits"
                )
            if fisher.kind == "empirical":
                loss(logits, labels).backward()
            else:
                gathering.update(logits)
            del logits
        if not gathering.commit(0.0, Counter()):
            raise NonFiniteError("K-FAC's factors contain NaN or infinity; check the network's weights and the images")
    finally:
        gathering.capture.stop()
    return gathering.statistics


def likelihood_of(loss: Loss) -> str:
    """The word of `secondorder.kfac.Fisher` for a mean loss; InputError for others, and for weighted classes."""
    kinds: dict[type[nn.Module], str] = {
        nn.CrossEntropyLoss: "cross_entropy",
        nn.MSELoss: "mse",
        nn.BCEWithLogitsLoss: "bce",
    }
    functions = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse", F.binary_cross_entropy_with_logits: "bce"}
    word = (functions.get(loss) if callable(loss) else None) or kinds.get(type(loss))  # type: ignore[arg-type]
    plain = getattr(loss, "reduction", "mean") == "mean" and getattr(loss, "weight", None) is None
    if word is None or not plain or getattr(loss, "pos_weight", None) is not None:
        raise InputError(
            f"loss {loss_name(loss)}: K-FAC's direction needs the mean cross-entropy, squared error or binary cross-entropy on "
            "logits, without weights of classes"
        )
    return word
