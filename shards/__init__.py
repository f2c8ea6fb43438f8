"""Raw files -> shards. Nothing here is needed by a training process."""
