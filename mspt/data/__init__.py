"""From a shard set to batches of molecules, in an order that is computed, not discovered."""
