"""What networks are trained on: images, the questions asked about them, episodes and
text.
"""

from minisupernet.data.images import ImageSet, augment, load, normalise

__all__ = ["ImageSet", "augment", "load", "normalise"]
