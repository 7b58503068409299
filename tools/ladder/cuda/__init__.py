"""The CUDA half of the ladder: run the source on the CPU (`sim`), compile it for GPUs (`nvcc`).

`sim` compiles a `.cu` file as C++ with the headers of this folder, threads as fibers, and reports
wrong collectives, out-of-bounds accesses, data races and the bytes moved. `nvcc` compiles the same
file for each target and reads registers, spills and shared memory from the binary.
"""
