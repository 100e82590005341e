"""The command ``millstream``. Nothing here is imported by ``import millstream``."""
