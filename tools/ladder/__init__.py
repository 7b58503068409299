"""The ladder: proof of GPU kernels on a machine without a GPU.

Triton kernels are run under a strict interpreter (`interpreter`), compiled for every target with
the specialisation the JIT would use (`dry_run`), and their binaries read for registers, spills,
shared memory and instruction mix (`resources`, `occupancy`). The CUDA half lives beside it.
`isolation` lets a test session run interpreter tests, which need their own process.
"""
