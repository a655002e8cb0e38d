"""First and second derivatives of modules at the input of the last forward pass, sample by sample."""
