"""Openings for the built-in model, which continues stories."""

from typing import Final

STORY_PROMPTS: Final = (
    "Once upon a time, in a house at the edge of the forest, there lived",
    "There was once a king who had three daughters, and the youngest",
    "Far away beyond the mountains an old woman kept a golden goose, which",
    "A poor fisherman went down to the sea one morning, and in his net he found",
    "The fox looked at the crow and said,",
    "In the middle of the winter, when the snow lay deep, a little girl",
    "Long ago, when the animals could still speak, the bear and the wolf",
    "The lamp in the tower had burned for a hundred years, until one night",
)
