"""K-FAC: natural-gradient optimisation with Kronecker-factored curvature, as a torch optimiser and as a preconditioner."""

from secondorder.kfac.optimizer import KFAC
from secondorder.kfac.options import Damping, Fisher, LevenbergMarquardt, Options
from secondorder.kfac.preconditioner import KFACPreconditioner
from secondorder.kfac.step_rule import STEP_RULES, StepRule

__all__ = ["KFAC", "STEP_RULES", "Damping", "Fisher", "KFACPreconditioner", "LevenbergMarquardt", "Options", "StepRule"]
