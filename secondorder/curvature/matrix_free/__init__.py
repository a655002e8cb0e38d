"""Products with a network's curvature by automatic differentiation, for any network.

Data flow: `batches`, `samples` (tensors or structures of them) -> `frozen_network` (the user's network, left untouched:
`module_state`, `random_state`), `network_outputs` (what of its outputs the loss reads) -> `batch_parts` and `memory` (how many
samples at once) -> `linearisation` (J v, J^T u, H v of a part), `jacobian` (all parts) -> `loss_curvature`, `output_matrix` (M
at the outputs) -> `gauss_newton`, `hessian` (operators). `layer_uses`, `per_sample` and `sample_gradients` are the fast way to
the rows of J.
`plain_attention` is what attention is evaluated in, `attention_calls` tells of its projections, `plain_functions` stand in for
functions with wrong derivatives. `batch_stream` and `streamed` are for data that are read batch by batch.

What is taken for granted of a network is asked of the network itself, on a few images (`trial`), where it matters: that images
do not act on one another (`sample_coupling`), that its backward pass is linear (`backward_check`), that forward mode gives the J
of the backward pass (`adjoint_check`), that second derivatives are right (`second_derivatives`), that neither it nor the loss
reads parameters past their modules (`captured_parameters`, `graph`, `loss_check`). What needs no further evaluation is asked of
the whole batch, too: products (`product_check`), layers that rows and factors are taken from, and the backward pass where there
are hooks (`gradient_hooks`) or Functions of a user.
"""
