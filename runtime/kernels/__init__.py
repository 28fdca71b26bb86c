"""GPU kernels, imported only where they run: Triton comes with torch for CUDA and nothing else."""
