"""Part C: gradients of one backbone under two heads, with and without K-FAC."""
