"""How rooms tell what they are doing. They never print; whoever calls decides what is shown."""

from __future__ import annotations


class Progress:
    """Silent by default; the command line shows bars and lines on stderr."""

    def update(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are finished; called often."""

    def say(self, text: str) -> None:
        """One line a person should see: a decision and why, or a warning."""
