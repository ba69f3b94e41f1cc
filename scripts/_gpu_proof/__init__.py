"""What scripts/gpu-proof is made of."""
