"""Encoders, the SpecFormer, heads, and the network that joins them."""
