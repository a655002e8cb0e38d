"""Long computations that show how far they are, and that go on where they were when their process was killed.

`long_run` is what users call: a folder of numbered records (`journal`) of every product and every sum that is finished, each with
what it was made from (`keys`). `sums` are loops over the parts of the data, whose sums so far are kept too. All else is computed
again from the records, which gives the same bits.
"""

from secondorder.curvature.resuming.long_run import long_run

__all__ = ["long_run"]
