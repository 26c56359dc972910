"""Plain PyTorch: exists everywhere, takes everything, differentiated by autograd itself."""

name = "reference"


def unavailable() -> str | None:
    """Plain PyTorch exists wherever torch does."""
    return None


def refuses(call: object) -> str | None:
    """Plain PyTorch takes every call that passed the op's checks."""
    return None
