"""What curvature takes, before it is computed: FLOPs, memory, and seconds at a rate that is given.

`without_numbers` sets up a network, a batch and a loss of shapes -> `rehearsal` runs a quantity's program on them, which `meter`
counts -> `programs` puts together what products, dense matrices and summaries (`lanczos`) take -> `estimate` is what users call.
"""

from secondorder.curvature.costs.estimate import BlockCosts, Cost, CurvatureCosts, curvature_costs

__all__ = ["BlockCosts", "Cost", "CurvatureCosts", "curvature_costs"]
