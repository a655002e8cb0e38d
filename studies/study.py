"""The table of studies: a new study is one row."""

from studies.convergence.study import STUDY as CONVERGENCE
from studies.curvature.study import STUDY as CURVATURE
from studies.engine.study import Study
from studies.landscape import STUDY as LANDSCAPE
from studies.optimisers.study import STUDY as OPTIMISERS
from studies.performance.study import STUDY as PERFORMANCE
from studies.preconditioning.study import STUDY as PRECONDITIONING
from studies.robustness.study import STUDY as ROBUSTNESS
from studies.transfer.study import STUDY as TRANSFER

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (LANDSCAPE, CURVATURE, PRECONDITIONING, PERFORMANCE, OPTIMISERS, CONVERGENCE, ROBUSTNESS, TRANSFER)
}
