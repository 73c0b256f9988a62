"""The U-Net and its options."""
