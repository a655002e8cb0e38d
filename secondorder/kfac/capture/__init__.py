"""What goes into the layers of a model and what comes back at their outputs, in the steps that update the factors.

`calls`: the record of a layer's call. `recorder`: forward hooks make records, and the user's backward passes find them.
`attention`: calls of the projections of nn.MultiheadAttention. `held`: whose gradients are in the weights, and not cleared.
`pull`: K-FAC's own backward passes. `hooks`: hooks that keep nothing alive, and the switch that has compiled models run
uncompiled.
"""

from secondorder.kfac.capture.recorder import Capture

__all__ = ["Capture"]
