"""Where the ratings released with the paper lie."""

from tests.shared import shared_path


def released(relative: str = ""):
    """A folder of the released evaluation; skips where it is absent."""
    return shared_path("data/qlora_eval") / relative
