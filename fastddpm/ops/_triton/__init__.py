"""The Triton kernels, one file per op. A file is imported only when its kernel runs."""
