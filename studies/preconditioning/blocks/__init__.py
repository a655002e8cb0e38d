"""Part D: GGN and Hessian blocks before and after K-FAC."""
