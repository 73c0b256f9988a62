"""The network for inference: its layers fused, its steps captured, kept from call to call."""
