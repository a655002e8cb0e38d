"""Global covariance pooling (GCP) and second-order optimisation.

Data flows left to right, and imports follow it:
``data`` -> ``networks`` (backbone + ``pooling`` head) -> ``training`` -> measurements (``landscape``).
``matrix_power`` holds the functions of symmetric matrices that the pooling heads are made of.
"""

__version__ = "0.2.0"
