"""From a name, a folder or a checkpoint to a float network with its noise schedule, decoder and text encoders."""
