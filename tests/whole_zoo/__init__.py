"""Every model class of the libraries, built tiny, quantized by the library and by qz, and compared: ``make zoo``."""
