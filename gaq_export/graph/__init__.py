"""The network as an ONNX graph: export, Q/DQ emission, whole denoising steps, and what each runtime wants rewritten."""
