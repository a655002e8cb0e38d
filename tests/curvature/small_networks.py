"""Small networks, batches and dense ground truth for the curvature tests, all in float64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from secondorder.networks import Network, network
from secondorder.pooling import Covariance, MatrixSquareRoot, UpperTriangle, pooling_head

CLASSES = 3


def chain(
    head: str = "gcp", activation: type[nn.Module] = nn.ReLU, channels: int = 4, **options: object
) -> nn.Sequential:
    """conv - activation - conv - activation - head (as leaf modules) - linear, for images [N, 2, 6, 6]."""
    layers = pooling_head(head, channels, **options).chain()  # type: ignore[arg-type]
    outputs = channels if head == "gap" else channels * (channels + 1) // 2
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        activation(),
        nn.Conv2d(3, channels, 3, padding=1),
        activation(),
        *layers,
        nn.Linear(outputs, CLASSES),
    ).double()


def straight(channels: int = 4) -> nn.Sequential:
    """A convolution that feeds the covariance without a nonlinearity: its position-summed factor is zero."""
    head = [Covariance(), MatrixSquareRoot(), UpperTriangle()]
    return nn.Sequential(nn.Conv2d(2, channels, 3), *head, nn.Linear(channels * (channels + 1) // 2, CLASSES)).double()


def built(backbone: str, head: str = "gcp", **options: object) -> Network:
    """A network of the table in eval mode with batch-norm statistics that are not 0 and 1."""
    made = network(backbone, head, CLASSES, **options).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return made


def batch(loss: nn.Module, n: int = 3, channels: int = 2, size: int = 6) -> tuple[Tensor, Tensor]:
    """Images [N, channels, size, size] and labels (cross-entropy) or targets [N, 3] (squared error)."""
    images = torch.randn(n, channels, size, size, dtype=torch.float64)
    if isinstance(loss, nn.MSELoss):
        return images, torch.randn(n, CLASSES, dtype=torch.float64)
    return images, torch.randint(CLASSES, (n,))


def flat_parameters(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """All parameters as one vector [P], and the map from such a vector to named tensors."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def unflatten(w: Tensor) -> dict[str, Tensor]:
        parts = w.split([p.numel() for p in named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}

    return torch.cat([p.flatten() for p in named.values()]), unflatten


def true_hessian(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """d^2 L / dw^2 [P, P] by torch.func."""
    w, unflatten = flat_parameters(model)
    return hessian(lambda v: loss(functional_call(model, unflatten(v), (data[0],)), data[1]))(w)


def true_ggn(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """J^T H_L J [P, P], J the Jacobian of all outputs and H_L the loss's Hessian at them, by torch.func."""
    w, unflatten = flat_parameters(model)
    outputs = lambda v: functional_call(model, unflatten(v), (data[0],))  # noqa: E731
    J = jacrev(outputs)(w).flatten(0, -2)
    z = outputs(w).detach()
    H = hessian(lambda f: loss(f.view_as(z), data[1]))(z.flatten())
    return J.mT @ H @ J


def reverse_ggn(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """J^T H J [P, P] with every row of J from a backward pass of its own: what no_grad holds constant is constant."""
    z, parameters = model(data[0]), list(model.parameters())
    pulled = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in z.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in pulled])
    H = torch.autograd.functional.hessian(lambda f: loss(f, data[1]), z.detach()).view(len(J), len(J))
    return J.mT @ H @ J


def reverse_hessian(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian by differentiating the gradient, of any network, also of one that `torch.func` cannot take."""
    parameters = list(model.parameters())
    g = torch.autograd.grad(loss(model(data[0]), data[1]), parameters, create_graph=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
        for one in torch.cat([t.flatten() for t in g])
    ]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


class By(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def around(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """linear - a function - linear - tanh - linear, for rows [N, 6]."""
    return nn.Sequential(nn.Linear(6, 4), By(function), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def rows(n: int = 5) -> tuple[Tensor, Tensor]:
    """Rows [n, 6] and labels."""
    return torch.randn(n, 6).double(), torch.randint(CLASSES, (n,))


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())
