"""The figures that trainings learn."""

from training.conftest import figures

__all__ = ["figures"]
