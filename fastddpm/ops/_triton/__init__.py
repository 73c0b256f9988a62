"""The ops as Triton kernels, one file each, imported only where a tensor is served by them."""
