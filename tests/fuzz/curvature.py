"""curvature_blocks: networks, losses, batches and arguments of all kinds, against dense matrices of torch.func."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from secondorder.curvature import QUANTITIES, CurvatureBlocks, curvature_blocks
from secondorder.pooling import pooling_head

from .call import Call, arguments, shown
from .values import absurd, bad_tensor, named, normal

K = 3
"""Outputs of the networks."""


def chain(random: Random) -> nn.Sequential:
    """A small network for images [N, 1, 4, 4], in evaluation, float64."""
    head = random.choice(("gap", "covariance", "gcp", "gcp_exact"))
    layers = pooling_head(head, 2).chain()
    outputs = 2 if head == "gap" else 3
    model = nn.Sequential(nn.Conv2d(1, 2, 3), random.choice((nn.Tanh(), nn.ReLU())), *layers, nn.Linear(outputs, K))
    return model.double().eval()


LOSSES: dict[str, Callable[[], Any]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "summed cross-entropy": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "weighted": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5])),
    "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "function": lambda: F.cross_entropy,
    "squared error": nn.MSELoss,
    "any": lambda: lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(),
}


def batch_for(random: Random, loss: Any, images: int = 3) -> tuple[Tensor, Tensor]:
    """Images and labels or targets."""
    x = normal(random, images, 1, 4, 4)
    return x, normal(random, images, K) if isinstance(loss, nn.MSELoss) else torch.tensor(
        [random.randrange(K) for _ in range(images)]
    )


def curvature(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((truth, truth, bad_argument, bad_argument, bad_batch, bad_network, bad_loss, of_blocks))(
        random
    )


def blocks_of(random: Random) -> tuple[str, dict[str, Any]]:
    """Good arguments of curvature_blocks and words."""
    words = random.choice(list(LOSSES))
    loss = LOSSES[words]()
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    given = {
        "network": chain(random),
        "loss": loss,
        "batch": batch_for(random, loss),
        "quantity": random.choice(list(QUANTITIES)),
    }
    head = type(given["network"][2]).__name__
    return f"{given['quantity']}, {words}, {head}", given


def dense_truth(given: dict[str, Any]) -> Tensor:
    """The GGN or Hessian [P, P] of all parameters."""
    model, loss, (x, y) = given["network"], given["loss"], given["batch"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]
    w = torch.cat([p.flatten() for p in parameters.values()])

    def f(v: Tensor) -> Tensor:
        parts = {n: t.view_as(p) for (n, p), t in zip(parameters.items(), v.split(sizes), strict=True)}
        return functional_call(model, parts, (x,))

    if given["quantity"] == "hessian":
        return hessian(lambda v: loss(f(v), y))(w)
    z = f(w)
    J = jacrev(f)(w).flatten(0, 1)
    H = hessian(lambda u: loss(u.view_as(z), y))(z.flatten())
    return J.mT @ H @ J


def truth(random: Random) -> Call:
    """Good arguments: GGN, Hessian and diagonal are those of torch.func; every block is symmetric, of its size, finite."""
    words, given = blocks_of(random)
    given |= random.choice(({}, {"chunk": 1}, {"chunk": 2}, {"seed": 3, "samples": 2}))
    known = given["quantity"] in ("ggn", "hessian", "diagonal")
    expected = dense_truth(given) if known else None

    def check(blocks: CurvatureBlocks) -> str | None:
        for name, p in given["network"].named_parameters():
            matrix = blocks[name].dense() if name in blocks else torch.zeros(p.numel(), p.numel())
            if (
                matrix.shape != (p.numel(), p.numel())
                or not matrix.isfinite().all()
                or not torch.equal(matrix, matrix.mT)
            ):
                return f"the block of {name} is not symmetric, finite or of its size"
        if expected is None:
            return None
        whole = blocks.whole.dense()
        right = expected.diagonal().diag() if given["quantity"] == "diagonal" else expected
        error, largest = float((whole - right).abs().max()), float(right.abs().max())
        return None if error <= 1e-7 * largest + 1e-14 else f"off by {error:.2g} of {largest:.2g}"

    extra = arguments({k: v for k, v in given.items() if k in ("chunk", "seed", "samples")})
    run = lambda: curvature_blocks(**given)  # noqa: E731
    return Call(f"curvature_blocks({words}, {extra})", run, check=check, watched=(given["network"],), pure=True)


def bad_argument(random: Random) -> Call:
    """One absurd argument; what is accepted can be multiplied with a vector."""
    words, given = blocks_of(random)
    field = random.choice(("quantity", "params", "samples", "seed", "fisher", "chunk", "memory"))
    value = absurd(random)
    if field == "params" and random.random() < 0.5:
        value = random.choice(
            (["0.weight"], "0.weight", ["0.weight", 3], ["x"], [], {"0.bias"}, iter(["0.bias"]), [None])
        )
    if field == "samples" and isinstance(value, int) and value > 10**4:
        value = random.choice((10**3, 10**400))
    given[field] = value

    def check(blocks: CurvatureBlocks) -> str | None:
        product = blocks.whole @ torch.ones(blocks.whole.size, dtype=torch.float64)
        return None if product.isfinite().all() else "a product that is not finite"

    run = lambda: curvature_blocks(**given)  # noqa: E731
    names = (field, named(value), "lambda", "parameter", "GiB", "batch")
    return Call(
        f"curvature_blocks({words}, {field}={shown(value)})",
        run,
        names=names,
        watched=(given["network"],),
        check=check,
        pure=True,
    )


def bad_batch(random: Random) -> Call:
    """Images or labels that do not fit."""
    words, given = blocks_of(random)
    x, y = given["batch"]
    bad_labels = (
        y[:2],
        y.float(),
        y + 100,
        y - 100,
        y[:, None],
        bad_tensor(random, y.double()),
        torch.full_like(y, -100),
        None,
    )
    batches = (
        (bad_tensor(random, x), y),
        (x, random.choice(bad_labels)),
        (x,),
        (x, y, y),
        absurd(random),
        [x, y],
        (x.float(), y),
        (x * 1e200, y),
    )
    given["batch"] = random.choice(batches)
    run = lambda: curvature_blocks(**given)  # noqa: E731
    shape = (
        [shown(t.shape if isinstance(t, Tensor) else t) for t in given["batch"]]
        if isinstance(given["batch"], tuple)
        else given["batch"]
    )
    return Call(f"curvature_blocks({words}, batch {shown(shape, 100)})", run, watched=(given["network"],), pure=True)


class Odd(nn.Module):
    """A network that returns something else than logits."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, K).double()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        """What the test says."""
        return self.value(self.layer(x.flatten(1)))


def raising(z: Tensor) -> Tensor:
    """A user's mistake, of an error with several lines."""
    raise ValueError("the first line\nthe second line")


USERS = (TypeError, KeyError, AttributeError, ZeroDivisionError, ValueError)
"""Errors of the user's own code, which go through as they are."""
ODD: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda z: (z, z),
    "a dictionary": lambda z: {"z": z},
    "a number": lambda z: z.sum(),
    "detached": lambda z: z.detach(),
    "one row": lambda z: z[:1],
    "no outputs": lambda z: z[:, :0],
    "whole numbers": lambda z: z.long(),
    "None": lambda z: None,
    "nan": lambda z: z * math.nan,
    "raises": raising,
    "index error": lambda z: z[:, 7],
    "type error": lambda z: z + "x",  # type: ignore[operator]
    "key error": lambda z: {}["x"],
    "attribute error": lambda z: z.nothing,  # type: ignore[attr-defined]
    "coupled": lambda z: z - z.mean(0),
    "complex": lambda z: z.to(torch.complex128),
    "half outputs": lambda z: z.half(),
    "division": lambda z: z / (1 // 0),
}


def bad_network(random: Random) -> Call:
    """Networks that are none, return odd things, or have odd weights."""
    words, given = blocks_of(random)
    kind = random.choice(
        (*ODD, "absurd", "half", "frozen", "no parameters", "nan weights", "mixed", "lazy", "inference", "meta")
    )
    model: Any = given["network"]
    if kind in ODD:
        model = Odd(ODD[kind])
    elif kind == "absurd":
        model = absurd(random)
    elif kind == "half":
        model.half()
    elif kind == "frozen":
        model = model.requires_grad_(False)
    elif kind == "no parameters":
        model = nn.Flatten()
    elif kind == "nan weights":
        model[0].weight.data.fill_(math.nan)
    elif kind == "mixed":
        model[-1].float()
    elif kind == "lazy":
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(K))
    elif kind == "meta":
        model = model.to("meta")
    given["network"] = model

    def run() -> CurvatureBlocks:
        if kind == "inference":
            with torch.inference_mode():
                return curvature_blocks(**given)
        return curvature_blocks(**given)

    expected = (
        "refuse"
        if kind in ("absurd", "half", "frozen", "no parameters", "nan weights", "inference", "nan")
        else "either"
    )
    watched = (model,) if isinstance(model, nn.Module) and kind not in ("lazy", "meta") else ()
    return Call(
        f"curvature_blocks({words}), network {kind} {shown(model) if kind == 'absurd' else ''}",
        run,
        watched=watched,
        expected="either" if isinstance(given["loss"], nn.MSELoss) else expected,
        pure=True,
        raises=USERS if "error" in kind or kind == "division" else (),
    )


def bad_loss(random: Random) -> Call:
    """Losses that are none, or return odd things."""
    words, given = blocks_of(random)
    losses: dict[str, Any] = {
        "absurd": absurd(random),
        "unreduced": nn.CrossEntropyLoss(reduction="none"),
        "a class": nn.CrossEntropyLoss,
        "float": lambda z, y: 1.0,
        "vector": lambda z, y: z.sum(1),
        "nan": lambda z, y: z.sum() * math.nan,
        "linear": lambda z, y: z.sum(),
        "one argument": lambda z: z.sum(),
        "raises": lambda z, y: raising(z),
        "detached": lambda z, y: z.detach().sum(),
        "bad weights": nn.CrossEntropyLoss(torch.ones(K + 1)),
        "zero weights": nn.CrossEntropyLoss(torch.zeros(K)),
        "negative weights": nn.CrossEntropyLoss(-torch.ones(K)),
        "nan weights": nn.CrossEntropyLoss(torch.full((K,), math.nan)),
        "smoothing": nn.CrossEntropyLoss(label_smoothing=1.0),
        "binary": nn.BCEWithLogitsLoss(),
        "nll": nn.NLLLoss(),
        "type error": lambda z, y: z.sum() + "x",
        "without second derivative": nn.MultiMarginLoss(p=2),
    }
    kind = random.choice(list(losses))
    given["loss"], given["quantity"] = losses[kind], random.choice((given["quantity"], "ggn", "hessian"))

    def run() -> Tensor:
        blocks = curvature_blocks(**given)
        return blocks.whole @ torch.ones(blocks.whole.size, dtype=torch.float64)

    check = lambda product: None if product.isfinite().all() else "a product that is not finite"  # noqa: E731
    return Call(
        f"curvature_blocks({words}), loss {kind} {shown(losses[kind])}",
        run,
        watched=(given["network"],),
        check=check,
        pure=True,
        raises=USERS if kind in ("raises", "type error", "one argument") else (),
    )


def of_blocks(random: Random) -> Call:
    """What is done with blocks: names, products with bad vectors, dense matrices that may not be."""
    _, given = blocks_of(random)
    given["loss"], given["quantity"] = nn.CrossEntropyLoss(), random.choice(list(QUANTITIES))
    given["batch"] = batch_for(random, given["loss"])
    blocks = curvature_blocks(**given)
    block = blocks["0.weight"]
    bad = random.choice(
        (
            bad_tensor(random, normal(random, block.size)),
            absurd(random),
            normal(random, block.size, 2, dtype=torch.float32),
        )
    )
    limit = random.choice((absurd(random), 10, 10**9))
    kind = random.choice(("@", "dense", "eigenvalues"))
    ways: dict[str, Callable[[], Any]] = {
        "@": lambda: block @ bad,
        "dense": lambda: block.dense(limit),
        "eigenvalues": lambda: block.eigenvalues(limit),
    }
    value = bad if kind == "@" else limit
    return Call(
        f"{kind} of {type(block).__name__} with {shown(value)}", ways[kind], watched=(given["network"],), pure=True
    )
