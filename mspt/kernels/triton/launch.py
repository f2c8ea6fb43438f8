"""How a kernel is started, and the blocks in which kernels work."""

import torch

# Elements of the tiles that a warp works on: 4 registers a thread and tile, so that every load is of 16 bytes a thread
# in float32. The widest kernel keeps eight sums and about twenty values: at most 168 registers (ahead_of_time). Twice
# the tile would take all 255, leave room for half the warps, and waste more of a neighbourhood's last block.
TILE = 128
# Head widths that the kernels take: powers of two, from one such load to two edges a tile.
WIDTHS = (8, 16, 32, 64)


def edges_a_block(width, tile=TILE):
    """How many edges (or pairs) of heads of this width a tile holds: neighbourhoods have 5 to 30 edges."""
    return tile // width


def launch(kernel, grid, *arguments, warps=1, **constants):
    """Run a kernel over a grid of programs, on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        start(kernel, grid, arguments, warps, constants)


def start(kernel, grid, arguments, warps, constants):
    """Start a kernel; ahead_of_time stands in for it."""
    kernel[grid](*arguments, num_warps=warps, **constants)
