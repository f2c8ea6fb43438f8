"""The operations in C++ for CPUs: vectors of the machine's own width, torch's own threads."""
