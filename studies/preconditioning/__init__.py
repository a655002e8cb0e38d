"""Preconditioning study: is GCP a second-order method in disguise?"""
