"""Where a backward pass has to end so that it passes all recorded nodes, and the memory that passing them takes."""

import torch
from natural import KFAC
from torch import nn

from secondorder.kfac.capture.pull import last_of
from studies.timing import peak_bytes


def test_a_backward_pass_ends_where_no_other_node_is_below() -> None:
    x = torch.randn(3, requires_grad=True)
    first = x.sin()
    left, right = first.exp(), x.cos()  # the right branch does not pass the first node
    middle = (left * first).tanh()
    y = (middle + right).sum()
    aside = x.exp()
    nodes = {name: t.grad_fn for name, t in (("first", first), ("left", left), ("right", right), ("middle", middle))}
    assert last_of(y.grad_fn, nodes.values()) == {nodes["first"], nodes["right"]}
    assert last_of(y.grad_fn, [nodes["middle"]]) == {nodes["middle"]}
    assert last_of(y.grad_fn, [y.grad_fn, aside.grad_fn]) == {y.grad_fn}
    assert last_of(y.grad_fn, []) == set()


def test_long_graphs_are_no_recursion() -> None:
    x = first = torch.ones(1, requires_grad=True).exp()
    for _ in range(5000):
        x = x + 1.0
    assert last_of(x.grad_fn, [first.grad_fn]) == {first.grad_fn}


def test_gradients_of_the_outputs_are_not_held_all_at_once() -> None:
    depth, numbers = 12, 16 * 8 * 32 * 32
    layers = [module for _ in range(depth) for module in (nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 32 * 32, 2, bias=False))
    optimizer = KFAC(model, lr=0.1, factor_interval=1, inverse_interval=1000)
    logits = model(torch.randn(16, 8, 32, 32))
    held = peak_bytes(lambda: optimizer.update_curvature(logits), torch.device("cpu"))
    assert held < 0.7 * depth * 4 * numbers  # of all outputs
