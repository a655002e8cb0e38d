"""Part B: the published approximation of GCP's backward pass against the exact one."""
