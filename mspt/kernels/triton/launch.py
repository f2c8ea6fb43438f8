"""How a kernel is started, and the blocks in which kernels work."""

import torch

# Elements of the tiles that a warp works on: 8 registers a thread and tile. The widest kernel keeps seven sums and
# about as many values; twice the tile would spill, half of it would leave most loads narrower than 16 bytes a thread.
TILE = 256
# Head widths that the kernels take: powers of two, at least one 16-byte load of bf16, at most four edges a tile.
WIDTHS = (8, 16, 32, 64)


def edges_a_block(width):
    """How many edges (or pairs) of heads of this width a tile holds: neighbourhoods have 5 to 30 edges."""
    return TILE // width


def launch(kernel, grid, *arguments, warps=1, **constants):
    """Run a kernel over a grid of programs, on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        start(kernel, grid, arguments, warps, constants)


def start(kernel, grid, arguments, warps, constants):
    """Start a kernel; ahead_of_time stands in for it."""
    kernel[grid](*arguments, num_warps=warps, **constants)
