"""Curvature of a network's loss: blocks as operators, their spectra, Kronecker approximations, and BackPACK through GCP.

blocks        `curvature_blocks`: GGN, Hessian, Fisher, K-FAC, EKFAC of any network, matrix-free
activations   `activation_curvature`: the same with respect to images or to what a module puts out
jacobians     `output_jacobians`: GGN blocks whose small eigenvalues count, in float64, and their `half_rank_condition`
costs         `curvature_costs`: FLOPs, memory and seconds of all this before it is computed
saving        `save_curvature`, `load_curvature`: operators, blocks and spectra in files
operators     what a block is: a symmetric operator: products, dense matrix, eigenvalues, a SciPy view
resuming      `long_run`: progress of all this, and going on after a process was killed
spectrum      eigenvalues, densities, traces and condition numbers of an operator, each with its error
fidelity      how well an approximate block fits the exact one
backpack      BackPACK's quantities through covariance heads and the paper's networks
"""

from secondorder.curvature.activations import ActivationCurvature, activation_curvature
from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.costs import BlockCosts, Cost, CurvatureCosts, curvature_costs
from secondorder.curvature.kronecker.blocks import kronecker_parameters
from secondorder.curvature.kronecker.fidelity import Fidelity, fidelity, fidelity_table
from secondorder.curvature.matrix_free.loss_curvature import SumOverSamples
from secondorder.curvature.operators import DampedOperator, damped_inverse
from secondorder.curvature.output_jacobians import OutputJacobians, half_rank_condition, output_jacobians
from secondorder.curvature.quantities import QUANTITIES, CurvatureBlocks
from secondorder.curvature.resuming import long_run
from secondorder.curvature.saving import load_curvature, save_curvature
from secondorder.curvature.spectrum import (
    SpectralDensity,
    SpectralSummary,
    TopEigenvalues,
    relative_difference,
    spectral_density,
    spectral_summary,
    summary_table,
    top_eigenvalues,
)

__all__ = [
    "QUANTITIES",
    "ActivationCurvature",
    "BlockCosts",
    "Cost",
    "CurvatureBlocks",
    "CurvatureCosts",
    "DampedOperator",
    "Fidelity",
    "OutputJacobians",
    "SpectralDensity",
    "SpectralSummary",
    "SumOverSamples",
    "TopEigenvalues",
    "activation_curvature",
    "curvature_blocks",
    "curvature_costs",
    "damped_inverse",
    "fidelity",
    "fidelity_table",
    "half_rank_condition",
    "kronecker_parameters",
    "load_curvature",
    "long_run",
    "output_jacobians",
    "relative_difference",
    "save_curvature",
    "spectral_density",
    "spectral_summary",
    "summary_table",
    "top_eigenvalues",
]
