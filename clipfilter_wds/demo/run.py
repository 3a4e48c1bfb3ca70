"""The demo."""


def demo(*, output: str = "demo_output") -> int:
    """Demo."""
    return 0
