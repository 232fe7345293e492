"""Numbers as people read them."""


def number(value: float) -> str:
    return f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def rate(value: float) -> str:
    """Returns three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else number(value)


def plus_minus(value: float, error: float) -> str:
    """Returns a value and its standard error or margin."""
    return f"{number(value)} ± {error:.1g}"
