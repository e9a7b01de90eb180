"""minisupernet: the companion package of the course "Networks that make networks"."""

__version__ = "0.1.0"
