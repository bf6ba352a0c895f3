"""Noise schedules, samplers and conditioning: plain mathematics over any network, no diffusers import."""
