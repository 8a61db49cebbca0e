"""Every model class of the libraries, built tiny, quantized by the library and by qz, and compared: ``make zoo``."""

from whole_zoo.torchvision_operations import declare_missing

declare_missing()  # before a library imports it
