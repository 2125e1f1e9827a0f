"""What loading did to each leaf."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """Every leaf of the model and every array of the file is in one of these.

    Attributes:
      source: what was loaded, and in which format it was.
      loaded: paths of the leaves that are the file's.
      resized: path -> sizes, as '14x14 -> 16x16'.
      initialised: path -> why the leaf is fresh.
      ignored: name in the file -> why it is left out.
      notes: what else the user should know: casts, values that are not finite.
      metadata: what the weights say of themselves, as a checkpoint does; or None.
    """

    source: str
    loaded: tuple[str, ...]
    resized: Mapping[str, str]
    initialised: Mapping[str, str]
    ignored: Mapping[str, str]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None

    def summary(self) -> str:
        """The counts, in one line; and the notes, one line each."""
        counts = [f'{len(self.loaded)} leaves loaded']
        if self.resized:
            sizes = ', '.join(sorted(set(self.resized.values())))
            counts.append(f'{len(self.resized)} resized ({sizes})')
        for what in ('initialised', 'ignored'):
            if reasons := getattr(self, what):
                why = ', '.join(sorted(set(reasons.values())))
                counts.append(f'{len(reasons)} {what} ({why})')
        return '\n'.join([f'{self.source}: {"; ".join(counts)}', *self.notes])

    def __str__(self) -> str:
        """All of it, a leaf a line."""
        lines = [self.summary()]
        lines += [f'loaded       {path}' for path in self.loaded]
        for what in ('resized', 'initialised', 'ignored'):
            lines += [
                f'{what:12} {name}: {text}'
                for name, text in getattr(self, what).items()
            ]
        return '\n'.join(lines)
