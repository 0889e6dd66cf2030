"""Triton kernels and the host functions that launch them; installed as stn_fast.kernels."""
