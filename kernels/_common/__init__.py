"""What two or more Triton kernels share unchanged; imports torch and triton only."""
