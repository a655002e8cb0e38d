"""Part A: how well pooling heads are conditioned on the features of real networks (theory T2)."""
