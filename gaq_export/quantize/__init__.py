"""Calibration data and settings around `calib`: trajectories, presets, recipes, noise correction, layer times."""
