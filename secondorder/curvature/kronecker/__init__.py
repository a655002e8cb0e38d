"""Kronecker-factored curvature: factors of a layer, K-FAC and EKFAC blocks of a network, and how well they fit."""
