"""Where an unexpected error came from, for the log: neither its message, which may quote a prompt, nor a path."""

import traceback


def place_of(error: BaseException) -> str:
    """Its type and the functions that it went through, outermost first: "KeyError in quire.a.f:10 > quire.a.g:20"."""
    frames = traceback.walk_tb(error.__traceback__)
    places = [f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}:{line}" for frame, line in frames]
    return f"{type(error).__name__} in {' > '.join(places) or 'no frame'}"
