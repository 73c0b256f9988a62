"""What knows nothing of diffusion: checks of arguments, files, progress bars, warnings."""
