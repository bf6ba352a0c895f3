"""Packs for the Hugging Face hub, and a Triton model repository."""
