"""The event loop of programs that run an engine in their own process."""

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, or asyncio's own where that is not installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
