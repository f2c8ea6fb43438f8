"""SphereNet's sums over triplets, without tensors as long as all triplets and as wide as a message.

Legend: e edges, t triplets, C channels of a triplet's message, B of what is known of a triplet.
"""

import torch

# Triplets at a time on a CPU: what is computed of them stays in a core's cache, and is computed again for the gradient.
# Elsewhere all are taken at once.
AT_A_TIME = 1024


def triplet_sums(sent, angles, torsions, angle_weight, torsion_weight, incoming, outgoing):
    """Σ sent[incoming] · (angle_weight angles) · (torsion_weight torsions) over the triplets of each outgoing edge.

    sent [e, C]; angles, torsions [t, B]; weights [C, B]; incoming, outgoing int64 [t] -> [e, C], summed in float32 at
    least. It can be differentiated as often as need be.
    """
    return _TripletSums.apply(sent, angles, torsions, angle_weight, torsion_weight, incoming, outgoing)


def _spans(index):
    """Slices of index, one at least: gradients hang together where there is no triplet too."""
    size = AT_A_TIME if index.device.type == "cpu" else max(1, len(index))
    return [slice(begin, begin + size) for begin in range(0, max(1, len(index)), size)]


def _zeros(like):
    """Where values like these are added up."""
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))


class _TripletSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent, angles, torsions, angle_weight, torsion_weight, incoming, outgoing):
        ctx.save_for_backward(sent, angles, torsions, angle_weight, torsion_weight, incoming, outgoing)
        total = _zeros(sent)
        for own in _spans(incoming):
            heard = sent.index_select(0, incoming[own])
            heard *= angles[own] @ angle_weight.T
            heard *= torsions[own] @ torsion_weight.T
            total.index_add_(0, outgoing[own], heard.to(total.dtype))
        return total.to(sent.dtype)

    @staticmethod
    def backward(ctx, gradient):
        """Of operations that have gradients themselves: there is a graph of them where one is asked for."""
        sent, angles, torsions, angle_weight, torsion_weight, incoming, outgoing = ctx.saved_tensors
        of_sent, of_angle_weight, of_torsion_weight = map(_zeros, (sent, angle_weight, torsion_weight))
        of_angles, of_torsions = [angles[:0]], [torsions[:0]]
        for own in _spans(incoming):
            heard, g = sent.index_select(0, incoming[own]), gradient.index_select(0, outgoing[own])
            angle, torsion = angles[own] @ angle_weight.T, torsions[own] @ torsion_weight.T
            g_torsion = g * torsion
            g_angles, g_torsions = g_torsion * heard, g * angle * heard
            of_sent.index_add_(0, incoming[own], (g_torsion * angle).to(of_sent.dtype))
            of_angles.append(g_angles @ angle_weight)
            of_torsions.append(g_torsions @ torsion_weight)
            of_angle_weight += g_angles.T @ angles[own]
            of_torsion_weight += g_torsions.T @ torsions[own]
        return (
            of_sent.to(sent.dtype),
            torch.cat(of_angles),
            torch.cat(of_torsions),
            of_angle_weight.to(angle_weight.dtype),
            of_torsion_weight.to(torsion_weight.dtype),
            None,
            None,
        )
