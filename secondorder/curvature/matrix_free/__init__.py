"""Products with a network's curvature by automatic differentiation, for any network.

Data flow: `frozen_network` (the user's network, left untouched) -> `batch_parts` and `memory` (how many samples at once) ->
`jacobian` (J v, J^T u, H v of a part) -> `loss_curvature`, `output_matrix` (M at the outputs) -> `gauss_newton`, `hessian`
(operators). `layer_uses`, `per_sample` and `sample_gradients` are the fast way to the rows of J.
"""
