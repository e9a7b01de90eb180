"""What networks are trained on: images, the questions asked about them, episodes and
text.
"""

from minisupernet.data.images import ImageSet, augment, normalise
from minisupernet.data.loading import load

__all__ = ["ImageSet", "augment", "load", "normalise"]
