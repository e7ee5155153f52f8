"""Base classes of the families of methods, one file each."""
