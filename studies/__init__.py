"""Runnable studies: ``python -m studies [name] --preset smoke|quick|cifar10|paper``."""
