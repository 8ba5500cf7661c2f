"""x."""

from ..probes import Probe

ALL: tuple[Probe, ...] = ()
