"""The convergence study: networks under slow and rapid decay of the learning rate."""
