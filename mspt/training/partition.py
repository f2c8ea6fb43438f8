"""Which part of which parameter this rank holds, one view of it for every ZeRO stage.

DeepSpeed keeps the full-precision weights in flat tensors, laid out differently at each stage; AdamW's moments lie in
tensors of the same layout, and so does the moving average. A Fragment maps a run of elements of one parameter to its
place in such a flat tensor.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Fragment:
    """Elements start to start + length of the flattened parameter name lie at offset in the master of that index."""

    name: str
    start: int
    length: int
    master: int
    offset: int

    def of(self, tensors):
        """This fragment's elements [length] of tensors laid out as the masters are; a view, detached."""
        return tensors[self.master].detach().view(-1)[self.offset : self.offset + self.length]

    def share(self, index, count):
        """The index-th of count nearly equal pieces of this fragment."""
        begin, end = self.length * index // count, self.length * (index + 1) // count
        return replace(self, start=self.start + begin, length=end - begin, offset=self.offset + begin)


def masters(parameters, optimizer, stage):
    """The flat tensors that AdamW updates on this rank: float32 (float64 only for a float64 module).

    parameters: dict name -> parameter, as wrapped by DeepSpeed. optimizer: DeepSpeed's. stage: ZeRO stage in force.
    """
    if stage == 0:
        return list(parameters.values())
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    # The two optimisers of stages 1 and 2 (bf16 at stage 1 has its own) name them differently.
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def fragments(parameters, optimizer, stage, rank):
    """This rank's fragments, in the order of parameters; arguments as of masters().

    At stage 0 every rank holds everything; at 1 to 3 each element is held by exactly one rank.
    """
    if stage == 0:
        return [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(parameters.items())]
    if stage == 3:
        found = [_stage_3(name, p, optimizer, rank) for name, p in parameters.items()]
        return [fragment for fragment in found if fragment.length > 0]
    return [_stage_1_2(name, p._hp_mapping) for name, p in parameters.items() if p._hp_mapping is not None]


def refresh_working_weights(optimizer, stage):
    """Copy the masters into the weights that the forward pass uses, on all ranks."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # As the end of DeepSpeed's own step: release, copy group by group, gather the small ones that stay gathered.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _stage_1_2(name, mapping):
    own, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, own.start, own.numel, mapping.param_group_index, place.start)


def _stage_3(name, parameter, optimizer, rank):
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    # Each rank holds padded elements; those past the parameter's end are padding.
    start = rank * padded
    length = max(0, min(padded, parameter.ds_numel - start))
    return Fragment(name, start, length, group, offset)
