"""Files and folders on the disk, by their descriptors, and the names beside an output."""
