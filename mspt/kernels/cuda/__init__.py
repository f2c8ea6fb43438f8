"""What CUDA C++ does better than Triton: work that branches, atom by atom. Compiled by nvcc at first use."""
