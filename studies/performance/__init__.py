"""Performance study: time and memory of the GCP head, of curvature quantities and of K-FAC steps."""
