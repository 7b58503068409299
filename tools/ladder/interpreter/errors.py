"""What the strict interpreter raises; each names the kernel and the tensor at fault."""


class LadderError(RuntimeError):
    """A kernel did something that the ladder does not accept."""


class OutOfBoundsError(LadderError):
    """A load or store missed the tensor whose pointer it used."""


class RaceError(LadderError):
    """Two programs of one launch touched an element that one of them wrote."""


class UnsupportedError(LadderError):
    """An operation that the interpreter cannot compute faithfully."""
