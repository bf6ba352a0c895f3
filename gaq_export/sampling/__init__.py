"""Drawing images with an engine: one batch, many shards, several workers, a diffusers pipeline."""
