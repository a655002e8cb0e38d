"""EKFAC's second moments against sums over samples, and its block against the exact Fisher matrix of small networks."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.kronecker.squares import CHUNK_BYTES, squared_gradients
from secondorder.kfac.inverses import CorrectedEigenbasis, Factors, Inverse, invert, restored

CLASSES = 3
NETWORKS = {
    "linear": (lambda: [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)], (5,)),
    "tokens": (lambda: [nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)], (2, 3)),
    "convolution": (
        lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)],
        (2, 4, 4),
    ),
    "depthwise": (lambda: [nn.Conv2d(3, 6, 2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(54, CLASSES)], (3, 4, 4)),
}
"""Layers and the shape of a sample."""


def vectors(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What [weight, bias] multiplies, `[N, G, T, D]`."""
    if isinstance(layer, nn.Conv2d):
        a = F.unfold(x, layer.kernel_size, padding=layer.padding).unflatten(1, (layer.groups, -1)).mT
    else:
        a = x.reshape(len(x), 1, -1, x.shape[-1])
    return torch.cat([a, torch.ones_like(a[..., :1])], -1)


def by_group(layer: nn.Linear | nn.Conv2d, g: Tensor) -> Tensor:
    """Output gradients as `[N, G, T, O]`."""
    if isinstance(layer, nn.Conv2d):
        return g.flatten(2).unflatten(1, (layer.groups, -1)).mT
    return g.reshape(len(g), 1, -1, g.shape[-1])


class Fisher:
    """Vectors a and g of a network's first layer for all samples and columns of the likelihood, and the exact blocks."""

    def __init__(self, kind: str, samples: int = 12) -> None:
        make, shape = NETWORKS[kind]
        network = nn.Sequential(*make()).double()
        layer = network[0]
        x = torch.randn(samples, *shape, dtype=torch.float64) * torch.linspace(0.2, 2, samples).view(
            -1, *[1] * len(shape)
        )
        y = layer(x)
        z = network[1:](y)
        p = z.softmax(-1).detach()
        root = p.sqrt().diag_embed() - p[..., None] * p[:, None].sqrt()  # H_n = root root^T
        columns = [torch.autograd.grad(z, y, root[..., c], retain_graph=True)[0] for c in range(CLASSES)]
        self.a = vectors(layer, x).repeat(CLASSES, 1, 1, 1)
        self.g = torch.cat([by_group(layer, column) for column in columns])
        self.samples = samples
        products = torch.einsum("ngto,ngtd->ngod", self.g, self.a).flatten(2)
        self.blocks = torch.einsum("ngi,ngj->gij", products, products) / samples
        weights = [torch.autograd.grad((z[n] * root[n, :, c]).sum(), [layer.weight, layer.bias], retain_graph=True)
                   for n in range(samples) for c in range(CLASSES)]  # fmt: skip
        flat = [
            torch.cat([w.flatten(1), b[:, None]], 1).unflatten(0, (len(self.blocks), -1)).flatten(1) for w, b in weights
        ]
        torch.testing.assert_close(
            torch.stack([torch.einsum("gi,gj->gij", v, v) for v in flat]).sum(0) / samples, self.blocks
        )

    def factors(self) -> Factors:
        A = torch.einsum("ngtd,ngte->gde", self.a, self.a) / (len(self.a) * self.a.shape[2])
        B = torch.einsum("ngto,ngtp->gop", self.g, self.g) / self.samples
        return Factors("layer", A, None, B)


def inverted(factors: Factors, kind: str, previous: dict[str, Inverse] | None = None) -> Inverse:
    report: Counter[str] = Counter()
    inverse = invert([factors], kind, [0.1], True, previous or {}, report)["layer"]
    assert not report
    return inverse


def corrected(factors: Factors, previous: dict[str, Inverse] | None = None) -> CorrectedEigenbasis:
    inverse = inverted(factors, "ekfac", previous)
    assert isinstance(inverse, CorrectedEigenbasis)
    return inverse


def blocks(inverse: Inverse, shape: torch.Size) -> Tensor:
    """The undamped matrix behind P, `[G, O D, O D]`: P^-1 - lambda I."""
    G, O, D = shape  # noqa: E741
    eye = torch.eye(O * D, dtype=torch.float64)
    columns = [inverse.solve(e.view(1, O, D).repeat(G, 1, 1), 0.01, False).flatten(1) for e in eye]
    return torch.linalg.inv(torch.stack(columns, -1)) - 0.01 * eye


def by_samples(Q_A: Tensor, Q_B: Tensor, a: Tensor, g: Tensor) -> Iterator[Tensor]:
    for inputs, gradients in zip(a, g, strict=True):
        yield (Q_B.mT @ (gradients.mT @ inputs) @ Q_A).square()


@pytest.mark.parametrize("kind", NETWORKS)
def test_nearer_to_the_exact_fisher_than_kfac(kind):
    fisher = Fisher(kind)
    inverse = corrected(fisher.factors())
    shape = inverse.S.shape
    kfac = blocks(inverted(fisher.factors(), "eigen"), shape)
    torch.testing.assert_close(blocks(inverse, shape), kfac)
    inverse.update(squared_gradients(inverse.Q_A, inverse.Q_B, fisher.a, fisher.g) / fisher.samples, 0.9)
    ekfac = blocks(inverse, shape)
    for F_ekfac, F_kfac, exact in zip(ekfac, kfac, fisher.blocks, strict=True):
        assert (F_ekfac - exact).norm() < 0.99 * (F_kfac - exact).norm()
        assert (F_ekfac - exact).norm() > 1e-6 * exact.norm()


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_best_diagonal_in_its_basis(kind):
    fisher = Fisher(kind)
    inverse = corrected(fisher.factors())
    inverse.update(squared_gradients(inverse.Q_A, inverse.Q_B, fisher.a, fisher.g) / fisher.samples, 0.9)
    for S, Q_B, Q_A, exact in zip(inverse.S, inverse.Q_B, inverse.Q_A, fisher.blocks, strict=True):
        Q = torch.kron(Q_B, Q_A)
        torch.testing.assert_close(S.flatten(), (Q.mT @ exact @ Q).diagonal())


# N, G, T, D, O: one position; fewer and more positions than outputs; groups.
@pytest.mark.parametrize(
    "shape", [(7, 1, 1, 4, 3), (5, 3, 1, 4, 2), (5, 1, 2, 4, 3), (5, 1, 9, 4, 3), (4, 2, 2, 3, 5), (4, 2, 6, 3, 2)]
)
@pytest.mark.parametrize("chunk", [1, CHUNK_BYTES])
def test_squared_gradients(monkeypatch, shape, chunk):
    monkeypatch.setattr("secondorder.curvature.kronecker.squares.CHUNK_BYTES", chunk)
    N, G, T, D, O = shape  # noqa: E741
    a, g = torch.randn(N, G, T, D, dtype=torch.float64), torch.randn(N, G, T, O, dtype=torch.float64)
    Q_A, Q_B = (torch.linalg.qr(torch.randn(G, n, n, dtype=torch.float64)).Q for n in (D, O))
    expected = torch.stack(list(by_samples(Q_A, Q_B, a, g))).sum(0)
    torch.testing.assert_close(squared_gradients(Q_A, Q_B, a, g), expected)
    views = squared_gradients(Q_A, Q_B, a.mT.contiguous().mT, g.mT.contiguous().mT)  # as patches come
    torch.testing.assert_close(views, expected)


def test_the_moving_average_is_unbiased():
    fisher = Fisher("linear")
    inverse = corrected(fisher.factors())
    moments = [torch.rand_like(inverse.S) for _ in range(3)]
    inverse.update(moments[0], 0.9)
    torch.testing.assert_close(inverse.S, moments[0])
    inverse.update(moments[1], 0.9)
    inverse.update(moments[2], 0.9)
    weights = [0.1 * 0.81, 0.1 * 0.9, 0.1]
    expected = sum(w * S for w, S in zip(weights, moments, strict=True)) / sum(weights)
    torch.testing.assert_close(inverse.S, expected)
    assert inverse.weight == pytest.approx(1 - 0.9**3)
    inverse.update(moments[0], 0.0)
    torch.testing.assert_close(inverse.S, moments[0])


def test_relative_damping_is_that_of_the_mean_second_moment():
    inverse = corrected(Fisher("depthwise").factors())
    inverse.update(torch.rand_like(inverse.S), 0.9)
    W = torch.randn_like(inverse.S)
    for i, S in enumerate(inverse.S):
        torch.testing.assert_close(
            inverse.solve(W, 0.3, True)[i], inverse.solve(W, 0.3 * float(S.square().sum() / S.sum()), False)[i]
        )
        assert float(torch.as_tensor(inverse.tikhonov(0.3, True))[i]) == pytest.approx(
            0.3 * float(S.square().sum() / S.sum())
        )
    inverse.update(torch.zeros_like(inverse.S), 0.0)
    torch.testing.assert_close(inverse.solve(W, 0.5, True), 2 * W)


@pytest.mark.parametrize("kind", ["linear", "depthwise"])
def test_new_bases_carry_the_second_moments_over(kind):
    fisher, other = Fisher(kind), Fisher(kind)
    before = corrected(fisher.factors())
    before.update(squared_gradients(before.Q_A, before.Q_B, fisher.a, fisher.g) / fisher.samples, 0.9)
    same = corrected(fisher.factors(), {"layer": before})
    torch.testing.assert_close(same.S, before.S)
    after = corrected(other.factors(), {"layer": before})
    assert after.weight == before.weight
    shape = before.S.shape
    for S, Q_B, Q_A, old in zip(after.S, after.Q_B, after.Q_A, blocks(before, shape), strict=True):
        Q = torch.kron(Q_B, Q_A)
        torch.testing.assert_close(S.flatten(), (Q.mT @ old @ Q).diagonal())


def test_nothing_is_carried_over_before_a_first_update():
    fisher, other = Fisher("linear"), Fisher("linear")
    after = corrected(other.factors(), {"layer": corrected(fisher.factors())})
    assert torch.equal(after.S, corrected(other.factors()).S)
    assert after.weight == 0


def test_the_state_goes_on_from_where_it_was():
    fisher = Fisher("convolution")
    inverse = corrected(fisher.factors())
    S = torch.rand_like(inverse.S)
    inverse.update(S, 0.9)
    copy = restored(
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in inverse.tensors().items()}
    )
    assert isinstance(copy, CorrectedEigenbasis)
    for both in (inverse, copy):
        both.update(2 * S, 0.9)
    W = torch.randn_like(S)
    assert torch.equal(copy.solve(W, 0.1, True), inverse.solve(W, 0.1, True))


def test_an_inverse_in_use_is_not_changed_by_an_update_elsewhere():
    inverse = corrected(Fisher("linear").factors())
    S = inverse.S
    before = S.clone()
    inverse.update(torch.rand_like(S), 0.9)
    assert torch.equal(S, before)
