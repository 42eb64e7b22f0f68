"""Kernels that read and write the paged KV cache: `reference` in plain torch, device-specific ones beside it."""
