"""Helpers that are independent of diffusion: checks of arguments, files, progress bars, warnings."""
