"""A file of safetensors in the host's memory, to be filled with tensors again and again and written as it is.

The format: 8 bytes that hold the length of the header, the header in JSON, then the tensors without a gap.
"""

import json
import mmap

import torch

# Names of safetensors for what a module may hold.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def host_image(tensors, device):
    """The file that is to hold tensors (key -> tensor) -> (its bytes, uint8, and in them key -> place of the tensor).

    Places are views that a copy of the tensor is put into. Beside a GPU the memory is pinned.
    """
    header, offset = {}, 0
    # Wide elements first: all are aligned then.
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        tensor = tensors[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    if device.type == "cuda":
        image = torch.empty(start + offset, dtype=torch.uint8, pin_memory=True)
    else:
        # Shared with forked loader workers: of private memory each page would be copied at the next save after a fork.
        image = torch.frombuffer(mmap.mmap(-1, start + offset), dtype=torch.uint8)
    image.zero_()  # the system gives the memory now and not during the first save
    image[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    places = {}
    for key, entry in header.items():
        begin, end = (start + at for at in entry["data_offsets"])
        places[key] = image[begin:end].view(tensors[key].dtype).view(tensors[key].shape)
    return image, places
