"""What a chapter needs of an image set: the one place that says so."""

from dataclasses import dataclass

from minisupernet.data.images import ImageSet
from minisupernet.errors import DataError

__all__ = ["NEEDS", "Need", "chapters_served", "lacking", "need"]


@dataclass(frozen=True)
class Need:
    """The least that serves: so many classes, and of each so many images."""

    classes: int = 8
    train: int = 20
    test: int = 10


NEEDS = {
    **{chapter: Need() for chapter in (1, 2, 3, 4, 5, 6, 7, 11)},
    8: Need(classes=12),  # six to train on, two that choose a rate, four never seen
    9: Need(classes=12),  # eight to train on, four never seen
}


def lacking(images: ImageSet, chapter: int) -> str | None:
    """What the image set has too few of for a chapter, in words; None where it serves.

    Raises:
        DataError: for a chapter that reads no images.
    """
    if chapter not in NEEDS:
        raise DataError(
            f"chapter {chapter} reads no images; those that do are"
            f" {', '.join(map(str, sorted(NEEDS)))}."
        )
    least = NEEDS[chapter]
    if images.classes < least.classes:
        return f"{images.classes} classes, fewer than the {least.classes}"
    for part, wanted in (("train", least.train), ("test", least.test)):
        counts = getattr(images, f"{part}_labels").bincount(minlength=images.classes)
        number = int(counts.argmin())
        if counts[number] < wanted:
            return (
                f"{int(counts[number])} {part} images of class {number}, fewer than the"
                f" {wanted}"
            )
    return None


def need(images: ImageSet, chapter: int) -> None:
    """Stop here, in one sentence, where an image set is too small for a chapter.

    Raises:
        DataError: where there are too few classes, or images of a class.
    """
    if lack := lacking(images, chapter):
        raise DataError(
            f"{images.source} has {lack} that chapter {chapter} needs; give more, or"
            ' take data = "shapes100".'
        )


def chapters_served(images: ImageSet) -> str:
    """Which chapters run on an image set, and what others lack, in one sentence."""
    short = {chapter: lack for chapter in NEEDS if (lack := lacking(images, chapter))}
    served = [str(chapter) for chapter in sorted(NEEDS) if chapter not in short]
    lacks = [f"chapter {c} does not: {lack} it needs" for c, lack in short.items()]
    if not served:
        return f"No chapter runs on {images.source}: {short[1]} it needs."
    return (
        "; ".join([f"Chapters {', '.join(served)} run on these images", *lacks]) + "."
    )
