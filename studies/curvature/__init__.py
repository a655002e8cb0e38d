"""Curvature study: conditioning and spectra of GGN and Hessian blocks, and K-FAC against them."""
