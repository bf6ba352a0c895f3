"""The mathematics: a float network and calibration samples in, a quantization plan out. Internal to gaq-export."""
