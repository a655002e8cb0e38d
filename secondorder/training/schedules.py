"""Learning-rate schedules of the convergence study: LRnorm, LRfast and LRadju per family of backbones.

e is the 1-based epoch of a published schedule and E_ref the number of epochs it was published for. A schedule is a
function e -> factor, the learning rate relative to the base learning rate, so any base learning rate can be used.

Stretching to E epochs keeps the fraction of the training that is done when an epoch starts: the k-th epoch
(k = 1..E) trains at reference epoch e = 1 + (k - 1) E_ref / E. With E = E_ref this is the published schedule, epoch
by epoch; the first epoch is always the published first one, so that even a single epoch trains at a useful rate.
Schedules with ``per_step`` are read at every step, at e = 1 + step E_ref / total (step = 0..total-1).

Deviation: the code that was published with the paper reads the formulas of ResNets and MobileNetV2 at 0-based epochs. There the
first epoch of LRfast has the rate 0.1 (53/52)^11 = 0.123 and that of LRadju 0.1 (50/49)^2 = 0.104, above the base rate; every
other rate comes an epoch later than here, where the first epoch is e = 1; and LRfast of ResNets ends after 30 epochs, at 2e-5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """A published learning-rate schedule: base learning rate x factor(e), e in [1, 1 + epochs).

    ``learning_rate`` is the published base learning rate, ``epochs`` the published length E_ref; both are None for
    the generic schedules, which have no published setting.
    """

    factor: Callable[[float], float]
    learning_rate: float | None
    epochs: int | None
    per_step: bool = False

    def factor_at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The factor at 0-based ``step`` of a training of ``epochs`` epochs of ``steps_per_epoch`` steps.

        Integers are multiplied before the one division, so that e is exact wherever it is a whole number (the jumps
        of ``resnet_norm``).
        """
        done, total = (step, steps_per_epoch * epochs) if self.per_step else (step // steps_per_epoch, epochs)
        return self.factor(1 + done * (self.epochs or 1) / total)


def resnet_norm(e: float) -> float:
    """LRnorm of the ResNets: 0.1^(e div 30); with 1-based e the first drop comes after 29 epochs."""
    return 0.1 ** (e // 30)


def resnet_fast(e: float) -> float:
    """LRfast of the ResNets: (1 - (e - 1)/52)^11, zero from e = 53 on, which is therefore its length."""
    return max(0.0, 1 - (e - 1) / 52) ** 11


def resnet_adju(e: float) -> float:
    """LRadju of the ResNets: (1 - (e - 1)/49)^2, zero from e = 50 on."""
    return max(0.0, 1 - (e - 1) / 49) ** 2


def mobilenet_norm(e: float) -> float:
    """LRnorm of MobileNetV2: 0.98^e (base learning rate 0.045)."""
    return 0.98**e


def mobilenet_fast(e: float) -> float:
    """LRfast of MobileNetV2: 0.92^e (base learning rate 0.06).

    The protocol gives no length. 100 epochs are used: there the rate has come down to where LRnorm ends,
    0.06 x 0.92^100 = 1.4e-5 = 0.045 x 0.98^400.
    """
    return 0.92**e


def mobilenet_adju(e: float) -> float:
    """LRadju of MobileNetV2: linear between 6e-2 (e = 1), 1e-2 (e = 50), 1e-3 (e = 100) and 1e-5 (e = 150)."""
    return float(np.interp(e, (1, 50, 100, 150), (6e-2, 1e-2, 1e-3, 1e-5))) / 6e-2


def linear(epochs: int) -> Callable[[float], float]:
    """The schedule of ShuffleNetV2: 1 - step/total, updated at every step, as a function of e = 1 + step epochs/total.

    It has no shape of its own per row: LRnorm, LRfast and LRadju differ in their length only, so stretched to the
    same number of epochs they are one schedule. The protocol says "fewer epochs" for LRfast without a number; 60 are
    used, a quarter of LRnorm's (as for MobileNetV2: 100 of 400).
    """
    return lambda e: 1 - (e - 1) / epochs


def cosine(e: float) -> float:
    """Half a cosine, (1 + cos(pi t))/2 with t = e - 1 the fraction of the training that is done (arXiv 1608.03983)."""
    return (1 + math.cos(math.pi * (e - 1))) / 2


SCHEDULES: dict[str, Schedule] = {
    "resnet_norm": Schedule(resnet_norm, 0.1, 100),
    "resnet_fast": Schedule(resnet_fast, 0.1, 53),
    "resnet_adju": Schedule(resnet_adju, 0.1, 50),
    "mobilenet_norm": Schedule(mobilenet_norm, 0.045, 400),
    "mobilenet_fast": Schedule(mobilenet_fast, 0.06, 100),
    "mobilenet_adju": Schedule(mobilenet_adju, 0.06, 150),
    "shufflenet_norm": Schedule(linear(240), 0.5, 240, per_step=True),
    "shufflenet_fast": Schedule(linear(60), 0.5, 60, per_step=True),
    "shufflenet_adju": Schedule(linear(100), 0.5, 100, per_step=True),
    "constant": Schedule(lambda e: 1.0, None, None),
    "cosine": Schedule(cosine, None, None, per_step=True),
}
