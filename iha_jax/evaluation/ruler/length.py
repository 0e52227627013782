"""The largest haystack that fits a length."""

from collections.abc import Callable


def largest_fitting(count: Callable[[int], int], limit: int, minimum: int, guess: int | None = None) -> int | None:
    """An n >= minimum with count(n) <= limit < count(n + 1); None where count(minimum) is over the limit.

    `count` is of a whole text's tokens, so calls are what costs: the search goes where the line through the last two
    counts meets the limit, and halves every third time. From a good guess it takes about four calls. Where `count`
    is not monotonic (merges across a unit's edge, positions drawn anew) n is one of several.

    Raises:
      ValueError: where 16 * limit more units do not fill the limit.
    """
    low, low_count = minimum, count(minimum)
    if low_count > limit:
        return None
    high = high_count = None
    slope = 1.0  # tokens a unit
    probe = guess if guess is not None and guess > low else low + 1
    for calls in range(1, 10**6):
        found = count(probe)
        if found <= limit:
            slope = (found - low_count) / (probe - low)
            low, low_count = probe, found
        else:
            high, high_count = probe, found
        if high is None or high_count is None:
            if low > minimum + 16 * limit:
                raise ValueError(f"{low} units of haystack are {low_count} tokens: they do not add up to {limit}")
            probe = low + (max(1, int((limit - low_count) / slope)) if slope > 0 else max(1, low - minimum))
        elif high - low == 1:
            return low
        elif calls % 3 == 0:
            probe = (low + high) // 2
        else:
            slope = (high_count - low_count) / (high - low)
            probe = min(max(low + int((limit - low_count) / slope), low + 1), high - 1)
    raise AssertionError("unreachable")
