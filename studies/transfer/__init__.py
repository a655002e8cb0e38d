"""Do features that were trained under GCP serve other tasks better? (primary claim 9)"""
