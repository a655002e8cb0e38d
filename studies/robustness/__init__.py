"""Is a network under GCP more robust to corruptions and perturbations of its images? (primary claim 8)"""
