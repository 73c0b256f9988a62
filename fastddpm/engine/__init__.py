"""The inference engine: fused layers, captured steps, and a cache of both between calls."""
