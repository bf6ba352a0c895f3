"""Pages about a calibration and an engine that open offline."""
