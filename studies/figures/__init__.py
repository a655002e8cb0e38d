"""Figures drawn from result tables only: `studies/figures/<study>.py` reads `<study>.csv`."""
