"""Sentences around a label: drawn at random in training, averaged in zero-shot evaluation."""

from __future__ import annotations

TRAIN = {
    "generic": (
        "{}",
        "this is {}",
        "an example of {}",
        "here we have {}",
        "it shows {}",
        "one more {}",
        "clearly {}",
        "what you see here is {}",
    ),
    "image": ("a picture of {}", "an image that shows {}", "a small picture with {}"),
    "video": ("a clip of {}", "a short film that shows {}", "moving pictures of {}"),
    "audio": ("the sound of {}", "a recording of {}", "one can hear {}"),
}

EVAL = {
    "generic": ("{}", "this is {}", "an example of {}", "it shows {}"),
    "image": ("{}", "this is {}", "a picture of {}", "an image that shows {}", "an example of {}", "it shows {}"),
    "video": ("{}", "this is {}", "a clip of {}", "a short film that shows {}", "an example of {}", "it shows {}"),
    "audio": ("{}", "this is {}", "the sound of {}", "a recording of {}", "an example of {}", "one can hear {}"),
}


def train_templates(media: str) -> tuple[str, ...]:
    """All templates for a label of this kind of media."""
    return TRAIN["generic"] + TRAIN.get(media, ())


def eval_templates(media: str) -> tuple[str, ...]:
    """The templates whose embeddings are averaged for a class of this kind of media."""
    return EVAL.get(media, EVAL["generic"])


def has_a_place(prompt: str) -> bool:
    """Whether a prompt shows the class that it is filled with, and needs nothing else."""
    try:
        return "\0" in prompt.format("\0")
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
